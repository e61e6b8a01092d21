// Prints info() and what one sync and one async op do, for the tests of the loader and the environment.
import { info, setDefaults, Tensor } from '../../../dist/index.js';
import { routeTopK, routeTopKSync } from '../../../dist/moe/index.js';

const logits = new Tensor('float32', Float32Array.from([1, 3, 2]), [1, 3]);
const outcome = { info: info() };
const describe = (error) => ({ name: error.name, code: error.code, message: error.message });
try {
  outcome.sync = Array.from(routeTopKSync(logits, { k: 2 }).indices.data);
} catch (error) {
  outcome.syncError = describe(error);
}
try {
  outcome.async = Array.from((await routeTopK(logits, { k: 2 })).indices.data);
} catch (error) {
  outcome.asyncError = describe(error);
}
setDefaults({ backend: 'auto' }); // mends whatever the environment broke
outcome.mended = Array.from(routeTopKSync(logits, { k: 2 }).indices.data);
console.log(JSON.stringify(outcome));
