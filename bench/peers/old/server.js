// The old server, told again: its packages in their versions, its steps in their order, its transport, mail and log.
// bench/README.md says what differs.
'use strict';

const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');
const Redis = require('ioredis');
const nodemailer = require('nodemailer');
const { v4: uuid } = require('uuid');

const { PEER_REDIS_URL, PEER_SMTP_PORT, PEER_TLS, PEER_PORT, PEER_PROTO } = process.env;
const SENDER = 'no-reply@example.com';
const SUCCESS = 0;
const REDIS_ERROR = 1;
const EXCEPTION = 2;
const CODE_TTL = 600; // seconds

const redisAt = new URL(PEER_REDIS_URL);
const redis = new Redis({ host: redisAt.hostname, port: Number(redisAt.port) });
redis.on('error', (failure) => {
  console.log('redis error', failure);
  redis.quit();
});

const transport = nodemailer.createTransport({
  host: '127.0.0.1',
  port: Number(PEER_SMTP_PORT),
  secure: PEER_TLS === '1',
  auth: { user: SENDER, pass: 'password' },
});

async function getCode(key) {
  try {
    const code = await redis.get(key);
    console.log('redis:', `<${code}>`, code === null ? 'no such key' : 'found');
    return code;
  } catch (failure) {
    console.log('redis get failed', failure);
    return null;
  }
}

async function keepCode(key, code) {
  try {
    await redis.set(key, code);
    await redis.expire(key, CODE_TTL);
    return true;
  } catch (failure) {
    console.log('redis set failed', failure);
    return false;
  }
}

function send(mail) {
  return new Promise((resolve, reject) => {
    transport.sendMail(mail, (failure, info) => {
      if (failure) {
        console.log(failure);
        reject(failure);
        return;
      }
      console.log('mail sent:', info.response);
      resolve(info.response);
    });
  });
}

async function getVarifyCode(call, callback) {
  const { email } = call.request;
  console.log('email is', email);
  try {
    const key = `code_${email}`;
    let code = await getCode(key);
    console.log('code in redis is', code);
    if (code === null) {
      code = uuid().substring(0, 4);
      if (!(await keepCode(key, code))) {
        callback(null, { email, error: REDIS_ERROR });
        return;
      }
    }
    console.log('code is', code);
    const text = `您的验证码为${code}请三分钟内完成注册`;
    const sent = await send({ from: SENDER, to: email, subject: '验证码', text });
    console.log('the relay said', sent);
    callback(null, { email, error: SUCCESS });
  } catch (failure) {
    console.log('failed:', failure);
    callback(null, { email, error: EXCEPTION });
  }
}

const options = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };
const { message } = grpc.loadPackageDefinition(protoLoader.loadSync(PEER_PROTO, options));
const server = new grpc.Server();
server.addService(message.VarifyService.service, { GetVarifyCode: getVarifyCode });
server.bindAsync(`127.0.0.1:${PEER_PORT || 0}`, grpc.ServerCredentials.createInsecure(), (failure, port) => {
  if (failure) throw failure;
  server.start();
  console.log(`ready ${port}`);
});
process.on('SIGTERM', () => process.exit(0));
