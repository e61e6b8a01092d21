import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import {
  type ExpertChoice,
  type ExpertChoiceOptions,
  routeExpertChoice,
  routeExpertChoiceSync,
} from '../../../lib/moe/routeExpertChoice.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import { compareRouting } from './routeTopK.ts';

interface Shape {
  tokens: number;
  experts: number;
  capacity: number;
  score?: ExpertChoiceOptions['score'];
  type?: FloatType;
  bench?: boolean;
}

const shapes: Shape[] = [
  { tokens: 67, experts: 8, capacity: 16 },
  { tokens: 130, experts: 60, capacity: 3 },
  { tokens: 97, experts: 33, capacity: 97 },
  { tokens: 50, experts: 16, capacity: 5, score: 'sigmoid' },
  { tokens: 50, experts: 17, capacity: 5, score: 'sqrt-softplus' },
  { tokens: 90, experts: 40, capacity: 4, type: 'bfloat16' },
  { tokens: 90, experts: 41, capacity: 4, type: 'float16' },
  { tokens: 12, experts: 1, capacity: 5 },
  { tokens: 7, experts: 4096, capacity: 2 },
  { tokens: 9, experts: 5, capacity: 0 },
  { tokens: 0, experts: 5, capacity: 0 },
  { tokens: 700, experts: 257, capacity: 6 },
  { tokens: 4096, experts: 64, capacity: 512, bench: true },
  { tokens: 16384, experts: 128, capacity: 256, bench: true },
];

function outputs(r: ExpertChoice): Tensor[] {
  return [r.indices, r.weights] as Tensor[];
}

/** Expert choice: every score and type, all tokens, none, and many experts. */
export const routeExpertChoiceCases: OpCase[] = shapes.map((shape) => {
  const { tokens, experts, capacity } = shape;
  const type = shape.type ?? 'float32';
  const score = shape.score ?? 'softmax';
  return {
    family: 'moe',
    op: 'routeExpertChoice',
    name: `${score} ${type} T=${tokens} E=${experts} C=${capacity}`,
    tolerance: 1e-6,
    bytes: tokens * experts * (type === 'float32' ? 4 : 2) + experts * capacity * 8,
    items: { unit: 'token', count: tokens },
    bench: shape.bench,
    prepare(random) {
      const values = random.normals(tokens * experts, 2);
      const logits = new Tensor(type, encodeFloats(values, type) as never, [tokens, experts]);
      const options = { capacity, score };
      return {
        run: (o) => outputs(routeExpertChoiceSync(logits, { ...options, ...o })),
        runAsync: async (o) => outputs(await routeExpertChoice(logits, { ...options, ...o })),
        timed: (o) => {
          const out = routeExpertChoiceSync(logits, { ...options, ...o });
          return () => routeExpertChoiceSync(logits, { ...options, ...o, out });
        },
        compare: compareRouting,
      };
    },
  };
});
