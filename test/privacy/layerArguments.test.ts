import { describe } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import {
  clippedGradientsSync,
  type LoraLayer,
  type PrivateLayer,
  perSampleSquaredNormsSync,
} from '../../lib/privacy/index.ts';
import { type Refusal, testRefusals } from '../helpers/errors.ts';

const f = (...dims: number[]) => Tensor.zeros('float32', dims);
const ints = (values: number[]) => new Tensor('int32', Int32Array.from(values), [values.length]);
const bytes = (...dims: number[]) => Tensor.zeros('uint8', dims);

const tied = {
  kind: 'tied-embedding',
  indices: ints([0, 4]),
  gradEmbeddings: f(2, 3),
  hidden: f(2, 3),
  gradLogits: f(2, 5),
};
const lora = { kind: 'lora', activations: f(2, 3), gradOutputs: f(2, 5), a: f(4, 3), b: f(5, 4) };
const experts = {
  kind: 'experts',
  activations: f(3, 2),
  gradOutputs: f(3, 4),
  sampleIds: ints([0, 1, -1]),
  expertIds: ints([2, -1, 0]),
  samples: 2,
  numExperts: 3,
  bias: false,
};
const groups = { kind: 'group-norm', normalized: f(2, 3, 4), gradOutputs: f(2, 3, 4) };
const conv = { kind: 'conv1d', input: f(2, 3, 4), gradOutputs: f(2, 5, 3), kernel: 2, bias: true };

const norms =
  (layer: object) =>
  (options: object): unknown =>
    perSampleSquaredNormsSync(layer as PrivateLayer | LoraLayer, options);
const sums =
  (layer: object, out: object) =>
  (options: object): unknown =>
    clippedGradientsSync(layer as PrivateLayer, new Float32Array(2), { ...options, out: out as never });

const refusals: Refusal[] = [
  [
    'tied: hidden width',
    norms({ ...tied, hidden: f(2, 4) }),
    'ERR_SHAPE',
    /^layer.hidden: expected 3 features/,
  ],
  [
    'tied: leading dims',
    norms({ ...tied, gradLogits: f(3, 5) }),
    'ERR_SHAPE',
    /layer.gradLogits: expected leading/,
  ],
  [
    'tied: index out of range',
    norms({ ...tied, indices: ints([0, 5]) }),
    'ERR_VALUE',
    /element 1 is 5: expected 0 to 4/,
  ],
  ['tied: paddingIndex', norms({ ...tied, paddingIndex: 5 }), 'ERR_OPTION', /paddingIndex/],
  ['tied: mask', norms({ ...tied, mask: bytes(3) }), 'ERR_SHAPE', /layer.mask: expected \[2\]/],
  ['tied: has no bias', norms({ ...tied, bias: true }), 'ERR_OPTION', /bias/],
  ['lora: a', norms({ ...lora, a: f(4, 2) }), 'ERR_SHAPE', /layer.a: expected \[rank, 3\]/],
  ['lora: rank 0', norms({ ...lora, a: f(0, 3), b: f(5, 0) }), 'ERR_SHAPE', /layer.a: expected \[rank, 3\]/],
  ['lora: b', norms({ ...lora, b: f(5, 3) }), 'ERR_SHAPE', /layer.b: expected \[5, 4\]/],
  ['lora: a missing', norms({ ...lora, a: undefined }), 'ERR_ARGUMENT', /layer.a/],
  ['lora: scale', norms({ ...lora, scale: Number.NaN }), 'ERR_OPTION', /layer.scale/],
  ['lora: out of another layer', sums(lora, { weight: f(1) }), 'ERR_OPTION', /weight/],
  ['lora: out incomplete', sums(lora, { a: f(4, 3) }), 'ERR_ARGUMENT', /out.b/],
  ['lora: out.b', sums(lora, { a: f(4, 3), b: f(4, 5) }), 'ERR_SHAPE', /out.b/],
  [
    'experts: sampleIds',
    norms({ ...experts, sampleIds: ints([0, 1, 2]) }),
    'ERR_VALUE',
    /layer.sampleIds: element 2 is 2/,
  ],
  ['experts: expertIds', norms({ ...experts, expertIds: ints([0, -2, 2]) }), 'ERR_VALUE', /expected -1 to 2/],
  [
    'experts: too few ids',
    norms({ ...experts, expertIds: ints([0]) }),
    'ERR_SHAPE',
    /layer.expertIds: expected \[3\]/,
  ],
  [
    'experts: rows',
    norms({ ...experts, gradOutputs: f(2, 4) }),
    'ERR_SHAPE',
    /layer.gradOutputs: expected \[3, p\]/,
  ],
  [
    'experts: rank',
    norms({ ...experts, activations: f(3, 2, 1) }),
    'ERR_SHAPE',
    /layer.activations: expected \[N, d\]/,
  ],
  ['experts: samples', norms({ ...experts, samples: 1.5 }), 'ERR_OPTION', /layer.samples/],
  ['experts: numExperts', norms({ ...experts, numExperts: 0 }), 'ERR_OPTION', /layer.numExperts/],
  ['experts: bias', norms({ ...experts, bias: undefined }), 'ERR_ARGUMENT', /layer.bias/],
  [
    'group-norm: mask',
    norms({ ...groups, mask: bytes(2, 3, 4) }),
    'ERR_SHAPE',
    /layer.mask: expected \[2, 4\]/,
  ],
  ['conv: mask', norms({ ...conv, mask: bytes(2, 4) }), 'ERR_SHAPE', /layer.mask: expected \[2, 3\]/],
  ['conv: out overlaps', sums(conv, { weight: conv.input, bias: f(5) }), 'ERR_SHAPE', /out.weight/],
];

describe('layers of several parts, and masks', () => testRefusals(refusals));
