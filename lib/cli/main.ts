import { allCases } from '../../test/cases/index.ts';
import { runCli } from './run.ts';

// `heddle info | head` closes the pipe early: that is no error.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error;
});

process.exitCode = await runCli(process.argv.slice(2), {
  io: {
    out: (line) => process.stdout.write(`${line}\n`),
    err: (line) => process.stderr.write(`${line}\n`),
    tty: process.stdout.isTTY === true && process.stderr.isTTY === true,
  },
  cases: allCases,
});
