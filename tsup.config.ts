import { defineConfig, type Options } from 'tsup';

// Entry points mirror package.json "exports"; the CLI is bundled with its terminal libraries so that the
// published package depends on node-gyp-build alone.
const library: Options[] = [
  {
    entry: {
      index: 'lib/index.ts',
      'moe/index': 'lib/moe/index.ts',
      'cli/main': 'lib/cli/main.ts',
      'attention/index': 'lib/attention/index.ts',
      'privacy/index': 'lib/privacy/index.ts',
    },
    format: ['esm', 'cjs'],
    dts: true,
    clean: false,
    sourcemap: true,
    splitting: true,
    shims: true,
    target: 'node20',
  },
];

const cli: Options[] = [
  {
    entry: { main: 'lib/cli/main.ts' },
    outDir: 'dist/cli',
    format: ['esm'],
    noExternal: ['cli-progress', 'cli-table3', 'benchmark', 'lodash', 'platform', /^pure-rand/],
    external: ['node-gyp-build'],
    target: 'node20',
    banner: {
      js: '#!/usr/bin/env node\nimport { createRequire as __cr } from "node:module"; const require = __cr(import.meta.url);',
    },
  },
];

export default defineConfig([...library, ...cli]);
