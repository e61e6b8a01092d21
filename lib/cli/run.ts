import { info } from '../backend.ts';
import { HeddleError } from '../errors.ts';
import { type Command, type Context, helpOf, parseCommand, UsageError } from './command.ts';

/** Loaded when used: `bench` brings a statistics library along, `verify` every op's cases. */
const COMMANDS: Record<string, () => Promise<Command>> = {
  info: async () => (await import('./info.ts')).infoCommand,
  verify: async () => (await import('./verify.ts')).verifyCommand,
  bench: async () => (await import('./bench.ts')).benchCommand,
  demo: async () => (await import('./demo.ts')).demoCommand,
};

async function printOverview({ io }: Context): Promise<void> {
  io.out(`heddle ${info().version}: native kernels for Node.js, and what checks and measures them`);
  io.out('');
  for (const load of Object.values(COMMANDS)) {
    const command = await load();
    io.out(`  heddle ${command.name.padEnd(8)}${command.summary.split('\n')[0]}`);
  }
  io.out('');
  io.out('heddle COMMAND --help tells the options of a command.');
}

/** Runs one command line; resolves to the exit code: 0 fine, 1 a wrong result or an error, 2 a bad command line. */
export async function runCli(argv: string[], context: Context): Promise<number> {
  const { io } = context;
  const [name, ...rest] = argv;
  if (name === undefined || name === '--help' || name === '-h' || name === 'help') {
    await printOverview(context);
    return 0;
  }
  if (name === '--version') {
    io.out(info().version);
    return 0;
  }
  const load = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined;
  if (load === undefined) {
    io.err(`heddle: unknown command '${name}'; there is: ${Object.keys(COMMANDS).join(', ')}`);
    return 2;
  }
  const command = await load();
  try {
    const { values, positionals } = parseCommand(command, rest);
    if (values['help']) {
      for (const line of helpOf(command)) io.out(line);
      return 0;
    }
    return await command.run(values, positionals, context);
  } catch (error) {
    if (error instanceof UsageError) {
      io.err(`heddle ${name}: ${error.message}`);
      io.err(`heddle ${name} --help tells its options`);
      return 2;
    }
    io.err(`heddle ${name}: ${error instanceof HeddleError ? error.message : (error as Error).stack}`);
    return 1;
  }
}
