import type { ExpertBiases, ExpertSources, Routing } from '../../lib/moe/index.ts';
import { Tensor } from '../../lib/tensor.ts';
import { biasesOf, routingOf, type Shape, sourcesOf } from '../cases/moe/expertsForward.ts';
import { Random } from '../cases/random.ts';

/** A layer of experts with its input, routing and the gradient of its output. */
export interface Problem {
  x: Tensor;
  gradOutput: Tensor;
  routing: Routing;
  sources: ExpertSources;
  biases?: ExpertBiases;
}

/** The data of a shape, drawn from a seed. */
export function problem(s: Shape, seed: number): Problem {
  const random = new Random(seed);
  const tokens = () => new Tensor('float32', random.normals(s.tokens * s.hidden), [s.tokens, s.hidden]);
  const sources = sourcesOf(s, random);
  const biases = s.biases ? biasesOf(s, random) : undefined;
  return { sources, biases, x: tokens(), gradOutput: tokens(), routing: routingOf(s, random) };
}
