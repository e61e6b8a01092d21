export { type CalibrateOptions, calibrateNoiseMultiplier } from './calibrate.ts';
export {
  type AccountantOptions,
  computeDelta,
  computeEpsilon,
  type DeltaOptions,
  type DeltaResult,
  type EpsilonOptions,
  type EpsilonResult,
} from './epsilon.ts';
export { PrivacyLedger, type SavedLedger } from './ledger.ts';
export type { AccountantName, Composition, PrivacyPhase } from './options.ts';
export type { PrvOptions } from './prv.ts';
export { DEFAULT_ORDERS } from './rdp.ts';
