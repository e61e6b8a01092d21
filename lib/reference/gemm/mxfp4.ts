/** Values of the E2M1 codes; code 8 is -0. */
export const E2M1_VALUES: readonly number[] = [
  0, 0.5, 1, 1.5, 2, 3, 4, 6, -0, -0.5, -1, -1.5, -2, -3, -4, -6,
];

/**
 * MXFP4 blocks as values: code × 2^(scale − 127), exact in float32.
 * @param blocks 16 bytes for 32 values, the low nibble first
 * @param scales one e8m0 exponent for each block
 */
export function decodeMxfp4(blocks: Uint8Array, scales: Uint8Array): Float32Array {
  const out = new Float32Array(blocks.length * 2);
  for (let g = 0; g < scales.length; g++) {
    const scale = 2 ** (scales[g] - 127);
    for (let i = g * 16; i < (g + 1) * 16; i++) {
      out[2 * i] = E2M1_VALUES[blocks[i] & 15] * scale;
      out[2 * i + 1] = E2M1_VALUES[blocks[i] >> 4] * scale;
    }
  }
  return out;
}
