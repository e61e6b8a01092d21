import { type Addon, type BackendName, backendOf, resolveBackend } from './backend.ts';
import { HeddleError } from './errors.ts';

const dispose: symbol = (Symbol as { dispose?: symbol }).dispose ?? Symbol.for('nodejs.dispose');

/**
 * Long-lived data of one backend: packed weights on cpu, plain arrays on reference. A running call keeps what it
 * uses alive, so `dispose()` is safe at any time; the garbage collector is the backstop.
 */
export abstract class Handle<R> {
  /** The backend that the data was made for; ops on this handle run there. */
  readonly backend: BackendName;
  /** @internal External of the addon, or the reference's data. */
  protected data: object | null;
  protected readonly addon: Addon | null;
  private readonly label: string;

  protected constructor(
    label: string,
    backend: 'auto' | BackendName | undefined,
    create: (addon: Addon) => object,
    reference: () => R,
    onDevice = false,
  ) {
    this.addon = resolveBackend(backend);
    this.backend = backendOf(this.addon);
    this.label = label;
    if (this.backend === 'cuda' && !onDevice) {
      throw new HeddleError('ERR_BACKEND', `${label} cannot be made on cuda; use backend cpu`);
    }
    this.data = this.addon === null ? (reference() as object) : create(this.addon);
    Object.defineProperty(this, dispose, { value: () => this.dispose(), enumerable: false });
  }

  /** @internal What ops pass on. */
  use(backend: 'auto' | BackendName | undefined): object {
    if (this.data === null) throw new HeddleError('ERR_DISPOSED', `${this.label} was disposed`);
    if (backend !== undefined && backend !== 'auto' && backend !== this.backend) {
      throw new HeddleError(
        'ERR_BACKEND',
        `${this.label} was packed for backend ${this.backend}; pack it again for ${backend}`,
      );
    }
    return this.data;
  }

  /** Frees the memory now (or when the last running call ends). Further use throws `ERR_DISPOSED`. */
  dispose(): void {
    if (this.data === null) return;
    if (this.addon !== null) this.release(this.addon, this.data);
    this.data = null;
  }

  protected abstract release(addon: Addon, data: object): void;
}
