/** Types of the part of fft.js (indutny, MIT) that the PRV accountant uses; the package ships none. */
declare module 'fft.js' {
  export default class FFT {
    /** @param size a power of two greater than 1 */
    constructor(size: number);
    /** Transforms `size` reals; writes the first half of the interleaved complex spectrum. */
    realTransform(out: Float64Array, data: Float64Array): void;
    /** Fills the second half of a spectrum that `realTransform` wrote. */
    completeSpectrum(spectrum: Float64Array): void;
    /** Interleaved complex, scaled by 1/size. */
    inverseTransform(out: Float64Array, data: Float64Array): void;
  }
}
