// A test harness of one header. A test file ends with PRIVTUNER_TEST_MAIN and holds any number of TEST(name) { ... }.
#pragma once

#include <cstdint>
#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& registry() {
  static std::vector<Test> tests;
  return tests;
}

struct Registration {
  Registration(const char* name, void (*body)()) { registry().push_back({name, body}); }
};

struct Failure : std::exception {};  // a CHECK ends its test, not the run

template <class T>
std::string text(const T& value) {
  std::ostringstream out;
  out.precision(17);
  if constexpr (sizeof(T) == 1 && std::is_integral_v<T>) {
    out << static_cast<int>(value);
  } else if constexpr (std::is_enum_v<T>) {
    out << static_cast<long long>(value);
  } else {
    out << value;
  }
  return out.str();
}

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::printf("    %s:%d: %s\n", file, line, what.c_str());
  throw Failure();
}

template <class A, class B, class Op>
void compare(const A& a, const B& b, Op holds, const char* what, const char* file, int line) {
  if (!holds(a, b)) fail(file, line, std::string(what) + " with " + text(a) + " and " + text(b));
}

inline int run() {
  int failed = 0;
  for (const Test& test : registry()) {
    const char* verdict = "ok";
    try {
      test.body();
    } catch (const Failure&) {
      verdict = "FAILED";
    } catch (const std::exception& error) {
      std::printf("    threw: %s\n", error.what());
      verdict = "FAILED";
    }
    if (verdict[0] == 'F') ++failed;
    std::printf("%-6s %s\n", verdict, test.name);
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed\n", static_cast<int>(registry().size()) - failed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                   \
  static void test_##name();                                         \
  static const check::Registration registration_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition) \
  do {                   \
    if (!(condition)) check::fail(__FILE__, __LINE__, "not true: " #condition); \
  } while (false)
#define CHECK_COMPARE_(a, b, op)                                                                                \
  check::compare((a), (b), [](const auto& x, const auto& y) { return x op y; }, "not true: " #a " " #op " " #b, \
                 __FILE__, __LINE__)
#define CHECK_EQ(a, b) CHECK_COMPARE_(a, b, ==)
#define CHECK_NE(a, b) CHECK_COMPARE_(a, b, !=)
#define CHECK_LT(a, b) CHECK_COMPARE_(a, b, <)
#define CHECK_LE(a, b) CHECK_COMPARE_(a, b, <=)
// The expression throws exactly this type, and the message holds `part`.
#define CHECK_THROWS(type, expression, part)                                                                \
  do {                                                                                                      \
    std::string message_ = "\n";                                                                            \
    try {                                                                                                   \
      static_cast<void>(expression);                                                                        \
    } catch (const type& error_) {                                                                          \
      if (typeid(error_) == typeid(type)) message_ = error_.what();                                         \
    }                                                                                                       \
    if (message_ == "\n") check::fail(__FILE__, __LINE__, "no " #type " from " #expression);                \
    if (message_.find(part) == std::string::npos) check::fail(__FILE__, __LINE__, "message: " + message_);  \
  } while (false)

#define PRIVTUNER_TEST_MAIN \
  int main() { return check::run(); }
