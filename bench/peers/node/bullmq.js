// BullMQ: `bullmq.js nodemailer`, `bullmq.js pipelined`, or `bullmq.js fill FIRST COUNT`, which puts jobs on its queue.
'use strict';

const { Queue, Worker } = require('bullmq');
const { settings, openRedis, codeOf, markSent, run } = require('./peer');
const { nodemailerPool, pipelinedPool } = require('./smtp');

const QUEUE = 'verification';
const BULK = 500; // jobs of one addBulk
const AHEAD = 4; // jobs in hand for each SMTP connection: more commands to Redis leave in one write
const EVENTS = 1e8; // that are kept, so that all replies can be counted

const connection = () => openRedis({ db: 1 });

/** What a job returns is its reply: BullMQ publishes it with the event of its completion, in the same step. */
function work(pool) {
  const redis = openRedis();
  const send = pool(settings);
  const worker = new Worker(
    QUEUE,
    async ({ id, data: { email } }) => {
      await send(email, await codeOf(redis, email), id);
      await markSent(redis, id);
      return { email, error: 0 };
    },
    { connection: connection(), concurrency: AHEAD * settings.connections, removeOnComplete: { count: 0 } },
  );
  worker.on('error', (failure) => console.error(failure.message));
  worker.on('failed', (_, failure) => console.error(failure.message));
  return worker.waitUntilReady().then(() => 0);
}

async function fill(first, count) {
  const queue = new Queue(QUEUE, { connection: connection(), streams: { events: { maxLen: EVENTS } } });
  for (let start = 0; start < count; start += BULK) {
    const numbers = Array.from({ length: Math.min(BULK, count - start) }, (_, i) => first + start + i);
    await queue.addBulk(
      numbers.map((number) => ({ name: 'send', data: { email: `user${String(number).padStart(7, '0')}@example.com` } })),
    );
  }
  process.exit(0);
}

const [what, ...numbers] = process.argv.slice(2);
if (what === 'fill') fill(...numbers.map(Number));
else run(settings.processes, () => work(what === 'pipelined' ? pipelinedPool : nodemailerPool));
