import type { PeerName, PeerSpec } from '../../test/cases/case.ts';
import type { Entrant } from '../harness.ts';

/** Another library that is ready to be timed. Connecting to one that is missing rejects with what to do about it. */
export interface Peer {
  name: PeerName;
  version: string;
  /** Rejects when the peer cannot do this op. */
  entrant(spec: PeerSpec, threads: number): Promise<Entrant>;
  close(): void;
}
