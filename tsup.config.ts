import { defineConfig } from 'tsup';

// Entry points mirror package.json "exports"; the CLI is bundled with its terminal libraries so that the
// published package depends on node-gyp-build alone.
export default defineConfig([
  {
    entry: {
      index: 'lib/index.ts',
      'moe/index': 'lib/moe/index.ts',
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
  {
    entry: { 'cli/main': 'lib/cli/main.ts' },
    format: ['esm'],
    noExternal: ['cli-progress', 'cli-table3'],
    external: ['benchmark', /^heddle/],
    target: 'node20',
    banner: {
      js: '#!/usr/bin/env node\nimport { createRequire as __cr } from "node:module"; const require = __cr(import.meta.url);',
    },
  },
]);
