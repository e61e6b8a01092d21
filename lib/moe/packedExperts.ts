import type { Addon } from '../backend.ts';
import { runAsync } from '../checkpoint/steps.ts';
import type { DeviceData, Location } from '../device.ts';
import {
  checkCopy,
  copyWeights,
  DeviceCopy,
  type DeviceWeights,
  PackedWeights,
} from '../gemm/deviceWeights.ts';
import { WEIGHT_CODE } from '../gemm/linear.ts';
import { meanSquareOf, type RoundingOptions, roundingOf } from '../gemm/weights.ts';
import {
  type AsyncOpOptions,
  checkOptions,
  nativeOnly,
  type OpOptions,
  optionChoice,
  optionNumber,
} from '../op.ts';
import { ACTIVATIONS, type Activation } from '../reference/gemm/activation.ts';
import type { WeightType } from '../reference/gemm/quantize.ts';
import type { ReferenceBank } from '../reference/moe/expertsForward.ts';
import type { TensorLike } from '../tensor.ts';
import type { BankShape, ExpertBiases } from './expertSources.ts';
import type { ExpertScales } from './expertWeights.ts';

const layoutOp = nativeOnly('layoutExpert');

const CALIBRATION_KEYS: ReadonlySet<string> = new Set(['hidden', 'intermediate']);

export interface PackExpertsOptions extends RoundingOptions {
  /**
   * How the weights are stored. Default: the sources' type (float16 becomes float32, float8_e4m3 is float8). MXFP4
   * sources packed as `'mxfp4'` keep their bits.
   */
  type?: WeightType;
  /** k values per scale: int4 32, 64 or 128 (default 32), MXFP4 32. Must divide d and f. */
  groupSize?: number;
  /** `'silu'` is SwiGLU, `'gelu'` and `'gelu-tanh'` are GeGLU, `'clamped-swiglu'` is gpt-oss. Default `'silu'`. */
  activation?: Activation;
  /** alpha of clamped SwiGLU. Default 1.702. */
  alpha?: number;
  /** Clamp of clamped SwiGLU. Default 7. */
  limit?: number;
  biases?: ExpertBiases;
  /**
   * int4: mean square of each input seen on calibration data, float32: `hidden` `[d]` of gate and up, `intermediate`
   * `[f]` of down. What an error of a weight is multiplied by in the search. Turns `search` on.
   */
  calibration?: { hidden?: TensorLike | Float32Array; intermediate?: TensorLike | Float32Array };
  /** Sources of type float8_e4m3: factors of their blocks of 128 x 128 (DeepSeek-V3's `weight_scale_inv`). */
  scales?: ExpertScales;
}

/** What a copy on another backend is made from. */
type BankSettings = Pick<PackExpertsOptions, 'activation' | 'alpha' | 'limit' | 'symmetric' | 'search'>;

/**
 * Packed weights of a layer's experts; made by {@link packExperts}. On backend cuda they live on the device, and take and
 * give tensors there as well as on the host.
 */
export class ExpertWeights extends PackedWeights<ReferenceBank, ExpertWeights> {
  readonly experts: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly type: WeightType;
  readonly groupSize: number;
  /** @internal How weights are rounded when they are packed. */
  readonly rounding: ReturnType<typeof roundingOf> & { meanSquares: (Float32Array | null)[] };
  private readonly gated: boolean;
  private readonly settings: BankSettings;

  /** @internal `device`: for backend cuda, the experts that are there. */
  constructor(
    shape: BankShape,
    options: PackExpertsOptions,
    type: WeightType,
    group: number,
    backend: OpOptions['backend'],
    device?: DeviceWeights,
  ) {
    const activation = optionChoice(options.activation, ACTIVATIONS, 'silu', 'activation');
    const alpha = optionNumber(options.alpha, -Infinity, 1.702, 'alpha');
    const limit = optionNumber(options.limit, 0, 7, 'limit');
    const { experts, hidden, intermediate, gated } = shape;
    checkOptions(options.calibration, CALIBRATION_KEYS, 'calibration');
    const meanSquares = [
      meanSquareOf(options.calibration?.hidden, hidden, 'calibration.hidden'),
      meanSquareOf(options.calibration?.intermediate, intermediate, 'calibration.intermediate'),
    ];
    const calibrated = meanSquares.some((m) => m !== null);
    const rounding = { ...roundingOf(options, type, calibrated), meanSquares };
    super(
      'the expert weights',
      backend,
      (addon) =>
        device ??
        (addon['createBank'] as unknown as (...args: unknown[]) => object)(
          WEIGHT_CODE[type],
          ACTIVATIONS.indexOf(activation),
          alpha,
          limit,
          gated,
          hidden,
          intermediate,
          experts,
          group,
        ),
      () => ({ activation, alpha, limit, hidden, intermediate, experts: new Array(experts) }),
      device !== undefined,
    );
    this.rounding = rounding;
    this.experts = experts;
    this.hiddenSize = hidden;
    this.intermediateSize = intermediate;
    this.type = type;
    this.groupSize = group;
    this.gated = gated;
    this.settings = { activation, alpha, limit, symmetric: rounding.symmetric, search: rounding.search };
    if (device !== undefined) this.bytes = device.data.byteLength;
  }

  protected copy(location: Location, options: Pick<AsyncOpOptions, 'threads' | 'signal'>) {
    checkCopy(location, this.backend, 'expert weights');
    return copyWeights(this.deviceCopy(), this.experts, layoutOp, (e) => [this.use(undefined), e], options);
  }

  private deviceCopy(): DeviceCopy {
    const bytes = (this.addon as Addon)['expertImageBytes'] as unknown as (h: object) => number;
    return new DeviceCopy(this.experts, () => bytes(this.use(undefined)));
  }

  /**
   * @internal The weights on the device, where the experts are packed one at a time and these, empty, hold that one.
   * @param pack fills the slots in order, and waits for `packed` behind each
   */
  async throughHost(
    pack: (packed: (expert: number) => Promise<void>) => Promise<void>,
    options: Pick<AsyncOpOptions, 'threads' | 'signal'>,
  ): Promise<ExpertWeights> {
    const copy = this.deviceCopy();
    try {
      await pack(async (e) => {
        await runAsync(copy.add(e, layoutOp, () => [this.use(undefined), e], options));
        this.evict(e);
      });
      return this.onDevice(copy.take());
    } finally {
      copy.release();
    }
  }

  protected onDevice(data: DeviceData): ExpertWeights {
    const {
      experts,
      hiddenSize: hidden,
      intermediateSize: intermediate,
      gated,
      settings,
      type,
      groupSize,
    } = this;
    const numbers = Float64Array.of(
      WEIGHT_CODE[type],
      ACTIVATIONS.indexOf(settings.activation as Activation),
      settings.alpha as number,
      settings.limit as number,
      Number(gated),
      Number(settings.symmetric === false),
      groupSize,
      experts,
      hidden,
      intermediate,
    );
    const shape = { experts, hidden, intermediate, gated };
    return new ExpertWeights(shape, settings, type, groupSize, 'cuda', { data, numbers });
  }

  /** @internal */
  account(): void {
    if (this.addon === null || this.data === null) return;
    this.bytes = (this.addon['accountBank'] as unknown as (h: object) => number)(this.data);
  }

  /** @internal Bytes that each expert takes once packed; biases are all there or none. */
  expertBytes(biased: boolean): number {
    const { hiddenSize: d, intermediateSize: f } = this;
    if (this.addon === null) return 4 * (3 * d * f + (biased ? 2 * f + d : 0)); // rows of float32
    return (this.addon['expertBytes'] as unknown as (h: object, b: boolean) => number)(
      this.use(undefined),
      biased,
    );
  }

  /** @internal Frees the slot of an expert that no running call uses. */
  evict(expert: number): void {
    const data = this.use(undefined);
    if (this.addon === null) delete (data as ReferenceBank).experts[expert];
    else (this.addon['evictExpert'] as unknown as (h: object, e: number) => void)(data, expert);
  }

  /** @internal Tells the garbage collector how much is packed now. */
  accountAs(bytes: number): void {
    this.bytes = bytes;
    if (this.addon === null) return;
    (this.addon['setBankBytes'] as unknown as (h: object, b: number) => void)(this.use(undefined), bytes);
  }

  protected releaseHost(addon: Addon, data: object): void {
    (addon['releaseBank'] as unknown as (h: object) => void)(data);
  }
}
