/** Differentially private training: accountants; the kernels are exported beside them. */
export * from './accountants/index.ts';
