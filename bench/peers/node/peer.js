// What every Node peer has in common: its settings, the mail, codes and marks in Redis, several processes.
'use strict';

const cluster = require('node:cluster');
const { randomInt } = require('node:crypto');
const { readFileSync } = require('node:fs');
const Redis = require('ioredis');

const settings = {
  redisUrl: process.env.PEER_REDIS_URL,
  smtpPort: Number(process.env.PEER_SMTP_PORT),
  connections: Number(process.env.PEER_CONNECTIONS), // of each process to the relay
  processes: Number(process.env.PEER_PROCESSES),
  port: Number(process.env.PEER_PORT || 0),
};

const CODE_TTL = 600; // seconds
const MARK_TTL = 3600;

// Split once, so that a mail costs one joining of strings.
const pieces = readFileSync(process.env.PEER_MAIL, 'latin1').split(/(RECIPIENT@peer\.example|CODE|REFERENCE)/);

/** The whole mail: CRLF lines, 7-bit, no line begins with a dot. */
function mail(recipient, code, reference) {
  let text = '';
  for (const piece of pieces) {
    if (piece === 'RECIPIENT@peer.example') text += recipient;
    else if (piece === 'CODE') text += code;
    else if (piece === 'REFERENCE') text += reference;
    else text += piece;
  }
  return text;
}

function newCode() {
  return String(randomInt(1e6)).padStart(6, '0');
}

/** Commands of one tick leave in one write. */
function openRedis(options = {}) {
  return new Redis(settings.redisUrl, { enableAutoPipelining: true, maxRetriesPerRequest: null, ...options });
}

/** Get or create, in one step. */
async function codeOf(redis, email) {
  const code = newCode();
  return (await redis.set(`code_${email}`, code, 'EX', CODE_TTL, 'NX', 'GET')) ?? code;
}

/** So that the same request sends no second mail. */
function markSent(redis, id) {
  return redis.set(`sent:${id}`, 1, 'EX', MARK_TTL);
}

/** Run `serve` in so many processes, and say "ready PORT" once it has resolved in all. SIGTERM to the first ends all. */
function run(processes, serve) {
  if (processes === 1 || cluster.isWorker) {
    process.on('SIGTERM', () => process.exit(0));
    serve().then((port = 0) => (cluster.isWorker ? process.send(port) : console.log(`ready ${port}`)));
    return;
  }
  let waiting = processes;
  let stopping = false;
  process.on('SIGTERM', () => {
    stopping = true;
    for (const worker of Object.values(cluster.workers)) worker.process.kill('SIGTERM');
  });
  cluster.on('message', (_, port) => {
    if (--waiting === 0) console.log(`ready ${port}`);
  });
  // It ends last, so that the CPU of all of them is its children's, and through it its parent's.
  cluster.on('exit', () => {
    if (!stopping) process.exit(1);
    if (Object.keys(cluster.workers).length === 0) process.exit(0);
  });
  for (let i = 0; i < processes; i++) cluster.fork();
}

module.exports = { settings, mail, newCode, openRedis, codeOf, markSent, run, CODE_TTL };
