// The old server's design at its best: get or create in one command, kept SMTP connections, a process for each core.
'use strict';

const { randomUUID } = require('node:crypto');
const { settings, openRedis, codeOf, markSent, run } = require('./peer');
const { serve } = require('./grpc_server');
const { nodemailerPool } = require('./smtp');

run(settings.processes, () => {
  const redis = openRedis();
  const send = nodemailerPool(settings);

  return serve(settings.port, async (email) => {
    const id = randomUUID();
    await send(email, await codeOf(redis, email), id);
    await markSent(redis, id);
    return 0;
  });
});
