// Replaces GateServer's own compare by VerifyServer's check over HTTP. Needs Boost.Beast and JsonCpp, which GateServer
// has. The right code works once; five wrong ones drop it.
#pragma once
#include <boost/asio.hpp>
#include <boost/beast.hpp>
#include <json/json.h>
#include <chrono>
#include <sstream>
#include <string>

// Returns 0, 1003 (no live code), 1004 (wrong code), 1 (Redis is down) or 1002 (no answer within 4 s).
inline int CheckVarifyCode(const std::string& host, const std::string& port, const std::string& email,
                           const std::string& code) {
    namespace http = boost::beast::http;
    using boost::beast::error_code;
    Json::Value question, answer;
    question["email"] = email;
    question["varifycode"] = code;
    http::request<http::string_body> request(http::verb::post, "/check_varifycode", 11, question.toStyledString());
    request.set(http::field::host, host);
    request.prepare_payload();
    http::response<http::string_body> response;
    boost::beast::flat_buffer buffer;
    boost::asio::io_context context;
    boost::beast::tcp_stream stream(context);
    error_code failed;
    const auto endpoints = boost::asio::ip::tcp::resolver(context).resolve(host, port, failed);
    if (failed) return 1002;
    failed = boost::asio::error::timed_out;
    stream.expires_after(std::chrono::seconds(4));
    stream.async_connect(endpoints, [&](error_code error, const auto&) {
        if (error) return;
        http::async_write(stream, request, [&](error_code error, std::size_t) {
            if (error) return;
            http::async_read(stream, buffer, response, [&](error_code error, std::size_t) { failed = error; });
        });
    });
    context.run();
    if (failed || response.result() != http::status::ok) return 1002;
    std::istringstream body(response.body());
    const bool parsed = Json::parseFromStream(Json::CharReaderBuilder(), body, &answer, nullptr);
    return parsed && answer.isObject() && answer["error"].isInt() ? answer["error"].asInt() : 1002;
}
