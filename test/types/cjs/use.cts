// The published types as a CommonJS program sees them. Compiled only.
import heddle = require('heddle');
import moe = require('heddle/moe');

const logits = new heddle.Tensor('float32', new Float32Array(4), [1, 4]);
const routing: moe.Routing = moe.routeTopKSync(logits, { k: 2, score: 'sigmoid' });
const ids: Int32Array = routing.indices.data;
const state: heddle.Info = heddle.info();
const code: heddle.HeddleErrorCode = 'ERR_SHAPE';
export const all = [ids, state.version, code];

// @ts-expect-error: indices are integers
export const wrong: Float32Array = routing.indices.data;
