// Asks for a code over raw Redis, with hiredis and JsonCpp: SUBSCRIBE, LPUSH, GET, as every caller does.
//   g++ -std=c++17 ask.cpp -o ask $(pkg-config --cflags --libs hiredis jsoncpp) && ./ask a@example.com
#include <hiredis/hiredis.h>
#include <json/json.h>
#include <iostream>
#include <memory>
#include <random>
#include <sstream>

const timeval patience{5, 0};  // seconds, for each answer of Redis
using Answer = std::unique_ptr<redisReply, decltype(&freeReplyObject)>;
using Redis = std::unique_ptr<redisContext, decltype(&redisFree)>;
Answer checked(void* answer) {
    if (!answer) throw std::runtime_error("no answer within 5 s");
    Answer given(static_cast<redisReply*>(answer), freeReplyObject);
    return given->type == REDIS_REPLY_ERROR ? throw std::runtime_error(given->str) : std::move(given);
}
Redis connect(int database) {
    auto setting = [](const char* name, const char* other) { return std::getenv(name) ? std::getenv(name) : other; };
    const int port = std::stoi(setting("REDIS_PORT", "6379"));
    Redis redis(redisConnectWithTimeout(setting("REDIS_HOST", "127.0.0.1"), port, patience), redisFree);
    if (!redis || redis->err || redisSetTimeout(redis.get(), patience)) throw std::runtime_error("Redis is not there");
    if (std::getenv("REDIS_PASSWORD")) checked(redisCommand(redis.get(), "AUTH %s", std::getenv("REDIS_PASSWORD")));
    checked(redisCommand(redis.get(), "SELECT %d", database));
    return redis;
}
std::string unique() {
    std::string text = "xxxxxxxx-xxxx-4xxx-axxx-xxxxxxxxxxxx";
    for (char& each : text) each = each == 'x' ? "0123456789abcdef"[std::random_device()() % 16] : each;
    return text;
}
std::string base64(const std::string& text) {
    const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string out;
    unsigned bits = 0, have = 0;
    for (unsigned char byte : text)
        for (bits = bits * 256 + byte, have += 8; have >= 6; have -= 6) out += digits[(bits >> (have - 6)) % 64];
    if (have) out += digits[(bits << (6 - have)) % 64];
    return out.append((4 - out.size() % 4) % 4, '=');
}
int main(int, char** argv) try {
    const std::string id = unique(), key = "celery-task-meta-" + id;
    const std::string body = base64("[[], {\"email\": " + Json::valueToQuotedString(argv[1]) + "}, {}]");
    const auto message = R"({"body": ")" + body + R"(", "content-type": "application/json", "content-encoding": "utf-8",
        "headers": {"task": "verification.send_code", "id": ")" + id + R"("}, "properties": {"body_encoding": "base64",
        "delivery_info": {"exchange": "", "routing_key": "verification"}, "delivery_tag": ")" + unique() + R"("}})";
    const Redis listener = connect(2), broker = connect(1), results = connect(2);
    checked(redisCommand(listener.get(), "SUBSCRIBE %s", key.c_str()));
    checked(redisCommand(broker.get(), "LPUSH verification %b", message.data(), message.size()));
    Answer answer = checked(redisCommand(results.get(), "GET %s", key.c_str()));
    void* published = nullptr;
    if (answer->type == REDIS_REPLY_NIL) redisGetReply(listener.get(), &published), answer = checked(published);
    Json::Value reply;
    std::istringstream(answer->elements ? answer->element[2]->str : answer->str) >> reply;
    std::cout << reply["result"] << "\n";
    return reply["result"]["error"] != 0;
} catch (const std::exception& trouble) {
    return std::cerr << trouble.what() << "\n", 1;
}
