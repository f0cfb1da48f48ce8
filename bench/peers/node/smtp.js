// Two ways of sending over kept SMTP connections; each is `send(email, code, id) -> Promise`.
'use strict';

const net = require('node:net');
const nodemailer = require('nodemailer');
const { mail } = require('./peer');

const SENDER = 'no-reply@example.com';

/** nodemailer's pool. It sets TCP_NODELAY by itself and pipelines MAIL, RCPT and DATA. */
function nodemailerPool({ smtpPort, connections }) {
  const transport = nodemailer.createTransport({
    host: '127.0.0.1',
    port: smtpPort,
    ignoreTLS: true,
    pool: true,
    maxConnections: connections,
    maxMessages: Infinity,
  });
  return (email, code, id) =>
    transport.sendMail({ envelope: { from: SENDER, to: [email] }, raw: mail(email, code, id) });
}

/** One connection that does what ours does: two writes and two waits for each mail. */
class Connection {
  constructor(port, onIdle) {
    this.onIdle = onIdle;
    this.unread = '';
    this.job = null;
    this.expected = 0; // replies to come before the next step
    this.step = this.greeted;
    this.socket = net.connect({ host: '127.0.0.1', port, noDelay: true });
    this.socket.setEncoding('latin1');
    this.socket.on('data', (data) => this.read(data));
    this.socket.on('error', (failure) => this.fail(failure));
    this.socket.on('close', () => this.fail(new Error('the relay closed the connection')));
    this.expected = 1;
  }

  send(job) {
    this.job = job;
    this.write(`MAIL FROM:<${SENDER}>\r\nRCPT TO:<${job.email}>\r\nDATA\r\n`, 3, this.invited);
  }

  write(text, expected, step) {
    this.expected = expected;
    this.step = step;
    this.socket.write(text, 'latin1');
  }

  read(data) {
    this.unread += data;
    let end;
    while ((end = this.unread.indexOf('\r\n')) >= 0) {
      const line = this.unread.slice(0, end);
      this.unread = this.unread.slice(end + 2);
      if (line[3] === '-') continue;
      if (line[0] !== '2' && line[0] !== '3') return this.fail(new Error(`the relay said ${line}`));
      if (--this.expected === 0) this.step();
    }
  }

  greeted() {
    this.write('EHLO peer\r\n', 1, this.idle);
  }

  invited() {
    const { email, code, id } = this.job;
    this.write(`${mail(email, code, id)}.\r\n`, 1, this.accepted);
  }

  accepted() {
    this.job.resolve();
    this.job = null;
    this.idle();
  }

  idle() {
    this.onIdle(this);
  }

  fail(failure) {
    if (this.job) this.job.reject(failure);
    this.job = null;
    this.socket.destroy();
  }
}

/** A pool of these. A lost connection is not opened again: a run in which a relay fails is void. */
function pipelinedPool({ smtpPort, connections }) {
  const idle = [];
  const waiting = [];
  let opened = 0;

  function onIdle(connection) {
    if (waiting.length) connection.send(waiting.shift());
    else idle.push(connection);
  }

  return (email, code, id) =>
    new Promise((resolve, reject) => {
      const job = { email, code, id, resolve, reject };
      if (idle.length) return idle.pop().send(job);
      waiting.push(job);
      if (opened < connections) {
        opened++;
        new Connection(smtpPort, onIdle);
      }
    });
}

module.exports = { nodemailerPool, pipelinedPool };
