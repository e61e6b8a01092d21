import { cpus } from 'node:os';
import { info } from '../backend.ts';
import type { Command } from './command.ts';

export const infoCommand: Command = {
  name: 'info',
  usage: '[--json]',
  summary: 'What runs on this machine, and why not the rest.',
  positionals: 0,
  options: { json: { type: 'boolean', help: 'as JSON' } },
  async run(values, _positionals, { io }) {
    const state = info();
    if (values['json']) {
      io.out(JSON.stringify(state, null, 2));
      return 0;
    }
    const line = (label: string, text: string) => io.out(`${label.padEnd(14)}${text}`);
    line('heddle', `${state.version} on ${state.platform}, Node ${state.node}`);
    line('processor', cpus()[0]?.model.trim() ?? 'unknown');
    line('backend', state.backend + (state.isa ? `, instruction set ${state.isa}` : ''));
    line('threads', String(state.threads));
    if (state.isas.length > 0) line('can run', state.isas.join(', '));
    if (state.cpuFeatures.length > 0) line('features', state.cpuFeatures.join(' '));
    for (const [name, backend] of Object.entries(state.backends)) {
      line(
        `  ${name}`,
        backend.available ? `available${backend.path ? `: ${backend.path}` : ''}` : 'not available',
      );
      if (backend.reason) line('', backend.reason);
      if (backend.remedy) line('', `→ ${backend.remedy}`);
    }
    return 0;
  },
};
