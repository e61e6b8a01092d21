// benchmark.js is given its two libraries by hand (bench/harness.ts); they carry no types of their own.
declare module 'lodash';
declare module 'platform';
