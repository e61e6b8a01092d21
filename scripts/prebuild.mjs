// Builds the binary that travels in the published tarball: prebuilds/<platform>-<arch>/*.node, which node-gyp-build
// finds at run time. Arguments go to prebuildify (`--cwd DIR` builds a copy elsewhere; note that it rebuilds build/).
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { findNodeHeaders, run } from './process.mjs';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const headers = findNodeHeaders();
const env = { ...process.env };
if (headers !== null) env.npm_config_nodedir = headers;
env.JOBS ??= 'max'; // node-gyp's; prebuildify passes none on
// Node-API is the same for every Node: this one's version is named because its headers are at hand. The libc is part
// of the name because a glibc binary does not load on musl.
const target = ['--target', process.versions.node, '--napi', '--strip', '--tag-libc'];
const args = [join(root, 'node_modules/prebuildify/bin.js'), ...target, ...process.argv.slice(2)];
const { code } = await run(process.execPath, args, { cwd: root, env, echo: true });
process.exitCode = code ?? 1;
