<?php
// Asks the HTTP API for a code, with nothing but PHP, and prints the reply.
//
//   php ask.php a@example.com
//
// API_KEY is a key of the API, where it asks for one.
$api = getenv('HTTP_API') ?: 'http://127.0.0.1:8081';
$headers = ['Content-Type: application/json'];
if ($key = getenv('API_KEY')) {
    $headers[] = "Authorization: Bearer $key";
}
$context = stream_context_create(['http' => [
    'method' => 'POST',
    'header' => $headers,
    'content' => json_encode(['email' => $argv[1]], JSON_UNESCAPED_UNICODE | JSON_THROW_ON_ERROR),
    'timeout' => 10, // seconds; the API answers within VERIFY_REPLY_TIMEOUT (5 s)
]]);
$reply = file_get_contents("$api/get_varifycode", false, $context);
if ($reply === false) {
    exit(1);
}
echo $reply, "\n";
exit((json_decode($reply, true)['error'] ?? 1) === 0 ? 0 : 1);
