// The old server as its users run it: GET, SET, EXPIRE one after the other, an SMTP connection for each mail, one process.
'use strict';

const nodemailer = require('nodemailer');
const { randomUUID } = require('node:crypto');
const { settings, mail, newCode, openRedis, run, CODE_TTL } = require('./peer');
const { serve } = require('./grpc_server');

run(1, () => {
  const redis = openRedis({ enableAutoPipelining: false });
  const transport = nodemailer.createTransport({ host: '127.0.0.1', port: settings.smtpPort, ignoreTLS: true });

  return serve(settings.port, async (email) => {
    const key = `code_${email}`;
    let code = await redis.get(key);
    if (code === null) {
      code = newCode();
      await redis.set(key, code);
      await redis.expire(key, CODE_TTL);
    }
    await transport.sendMail({
      envelope: { from: 'no-reply@example.com', to: [email] },
      raw: mail(email, code, randomUUID()),
    });
    return 0;
  });
});
