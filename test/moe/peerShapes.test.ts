import type { RouterOptions } from '../../lib/moe/index.ts';
import { type RoutingShape, routeTopKCase } from '../cases/moe/routeTopK.ts';
import { testCases } from '../helpers/cases.ts';

// Shapes and options of other projects' routing tests, on our data and against our reference.

const scores: RouterOptions[] = [
  { score: 'softmax' },
  { score: 'sigmoid' },
  { softmaxOver: 'selected' },
  { score: 'sqrt-softplus' },
];

/** ggml `topk_moe` in tests/test-backend-ops.cpp. */
const ggml = [
  [8, 22, 4],
  [31, 22, 8],
  [32, 22, 8],
  [40, 22, 8],
  [71, 22, 8],
  [128, 1, 128],
  [129, 1, 128],
  [160, 4, 160],
  [256, 22, 6],
  [288, 22, 8],
].flatMap(([experts, tokens, k]) =>
  scores.flatMap((score) =>
    [false, true].flatMap((normalize) =>
      [false, true].flatMap((bias) =>
        [1, 2].map((scale): RoutingShape => {
          const options = { k, ...score, normalize, scale };
          return { name: `ggml ${JSON.stringify(options)} bias ${bias}`, experts, tokens, options, bias };
        }),
      ),
    ),
  ),
);

/** vLLM tests/kernels/moe/test_grouped_topk.py. */
const vllm = [1, 33, 64].flatMap((tokens) =>
  [true, false].flatMap((normalize) =>
    (['softmax', 'sigmoid'] as const).flatMap((score) =>
      [1, 2.5].flatMap((scale) =>
        (['bfloat16', 'float32'] as const).map((type): RoutingShape => {
          const groups = { count: 8, keep: 2, score: 'top2' as const };
          const options = { k: 2, score, normalize, scale, groups };
          const name = `vLLM grouped ${JSON.stringify({ score, normalize, scale, type })}`;
          return { name, experts: 16, tokens, options, bias: true, type };
        }),
      ),
    ),
  ),
);

testCases([...ggml, ...vllm].map(routeTopKCase));
