// Asks for a code over plain Redis, with hiredis and JsonCpp: SUBSCRIBE, LPUSH, GET.
//   g++ -std=c++17 ask.cpp -o ask $(pkg-config --cflags --libs hiredis jsoncpp) && ./ask a@example.com
#include <hiredis/hiredis.h>
#include <json/json.h>
#include <iostream>
#include <memory>
#include <random>
#include <regex>
#include <sstream>

std::string setting(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value ? value : otherwise;
}
const std::string seconds = setting("VERIFY_REPLY_TIMEOUT", "5");  // for each answer of Redis
const timeval timeout{std::stoi(seconds), 0};
using Answer = std::unique_ptr<redisReply, decltype(&freeReplyObject)>;
using Redis = std::unique_ptr<redisContext, decltype(&redisFree)>;
Answer checked(void* answer) {
    if (!answer) throw std::runtime_error("no reply within " + seconds + " s");
    Answer given(static_cast<redisReply*>(answer), freeReplyObject);
    return given->type == REDIS_REPLY_ERROR ? throw std::runtime_error(given->str) : std::move(given);
}
std::string decoded(const std::string& text) {  // %20 -> space
    std::string out;
    for (std::size_t i = 0; i < text.size(); i += text[i] == '%' ? 3 : 1)
        out += text[i] == '%' ? static_cast<char>(std::stoi(text.substr(i + 1, 2), nullptr, 16)) : text[i];
    return out;
}
Redis connect(int database) {
    const std::string url = setting("VERIFY_REDIS_URL", "redis://127.0.0.1:6379");
    std::smatch part;  // user, password, host, port; rediss:// would need hiredis_ssl
    if (!std::regex_match(url, part, std::regex("redis://(?:([^:@]*):([^@]*)@)?([^:/]+)(?::(\\d+))?/?")))
        throw std::runtime_error("VERIFY_REDIS_URL is not redis://user:password@host:port");
    const int port = part[4].matched ? std::stoi(part[4]) : 6379;
    Redis redis(redisConnectWithTimeout(part[3].str().c_str(), port, timeout), redisFree);
    if (!redis || redis->err || redisSetTimeout(redis.get(), timeout)) throw std::runtime_error("Redis is down");
    const std::string user = part[1].length() ? decoded(part[1]) : "default", password = decoded(part[2]);
    if (part[2].matched) checked(redisCommand(redis.get(), "AUTH %s %s", user.c_str(), password.c_str()));
    checked(redisCommand(redis.get(), "SELECT %d", database));
    return redis;
}
std::string uuid() {
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
    const std::string id = uuid(), key = "celery-task-meta-" + id;
    const std::string body = base64("[[], {\"email\": " + Json::valueToQuotedString(argv[1]) + "}, {}]");
    const auto message = R"({"body": ")" + body + R"(", "content-type": "application/json", "content-encoding": "utf-8",
        "headers": {"task": "verification.send_code", "id": ")" + id + R"("}, "properties": {"body_encoding": "base64",
        "delivery_info": {"exchange": "", "routing_key": "verification"}, "delivery_tag": ")" + uuid() + R"("}})";
    const Redis subscriber = connect(2), broker = connect(1), results = connect(2);
    checked(redisCommand(subscriber.get(), "SUBSCRIBE %s", key.c_str()));
    checked(redisCommand(broker.get(), "LPUSH verification %b", message.data(), message.size()));
    Answer answer = checked(redisCommand(results.get(), "GET %s", key.c_str()));
    void* published = nullptr;
    if (answer->type == REDIS_REPLY_NIL) redisGetReply(subscriber.get(), &published), answer = checked(published);
    Json::Value reply;
    std::istringstream(answer->elements ? answer->element[2]->str : answer->str) >> reply;
    std::cout << reply["result"] << "\n";
    return reply["result"]["error"] != 0;
} catch (const std::exception& error) {
    return std::cerr << error.what() << "\n", 1;
}
