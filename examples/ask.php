<?php
// Asks for a code at the HTTP door, with nothing but PHP, and prints the reply.
//
//   php ask.php a@example.com
$door = getenv('VERIFY_HTTP_DOOR') ?: 'http://127.0.0.1:8081';
$context = stream_context_create(['http' => [
    'method' => 'POST',
    'header' => 'Content-Type: application/json',
    'content' => json_encode(['email' => $argv[1]], JSON_UNESCAPED_UNICODE | JSON_THROW_ON_ERROR),
    'timeout' => 10, // seconds; the door answers within VERIFY_REPLY_TIMEOUT, 5 s unless set
]]);
$reply = file_get_contents("$door/get_varifycode", false, $context);
if ($reply === false) {
    exit(1);
}
echo $reply, "\n";
exit((json_decode($reply, true)['error'] ?? 1) === 0 ? 0 : 1);
