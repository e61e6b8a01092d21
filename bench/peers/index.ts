import type { PeerName } from '../../test/cases/case.ts';
import { connectOnnxruntime } from './onnxruntime.ts';
import type { Peer } from './peer.ts';
import { connectPytorch } from './pytorch.ts';

const CONNECT: Record<PeerName, () => Promise<Peer>> = {
  pytorch: connectPytorch,
  onnxruntime: connectOnnxruntime,
};

export interface Peers {
  ready: Map<PeerName, Peer>;
  /** Reason by name, for the peers that are not ready. */
  missing: Map<PeerName, string>;
  close(): void;
}

/** Connects to every peer that is installed. */
export async function connectPeers(): Promise<Peers> {
  const ready = new Map<PeerName, Peer>();
  const missing = new Map<PeerName, string>();
  for (const name of Object.keys(CONNECT) as PeerName[]) {
    try {
      ready.set(name, await CONNECT[name]());
    } catch (error) {
      missing.set(name, (error as Error).message);
    }
  }
  return {
    ready,
    missing,
    close() {
      for (const peer of ready.values()) peer.close();
    },
  };
}
