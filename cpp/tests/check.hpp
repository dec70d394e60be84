// A test harness of one header. A test file holds any number of TEST(name) { ... } and ends with PRIVTUNER_TEST_MAIN.
#pragma once

#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <vector>

namespace check {

// Cases that take long, and those drawn at random, are a fifth under the sanitizers, where each takes ten times as
// long.
#ifdef PRIVTUNER_SANITIZED
constexpr int kShare = 5;
#else
constexpr int kShare = 1;
#endif

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

struct Failure : std::exception {};  // a CHECK that does not hold ends its test, not the run

template <class T>
std::string text(const T& value) {
  std::ostringstream out;
  out.precision(17);
  constexpr bool kNumber = std::is_enum_v<T> || (std::is_integral_v<T> && sizeof(T) == 1);
  if constexpr (kNumber) out << static_cast<long long>(value);
  if constexpr (!kNumber) out << value;
  return out.str();
}

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::printf("    %s:%d: %s\n", file, line, what.c_str());
  throw Failure();
}

template <class A, class B, class Relation>
void compare(const A& a, const B& b, Relation holds, const char* what, const char* file, int line) {
  if (!holds(a, b)) fail(file, line, std::string("not true: ") + what + ": " + text(a) + " and " + text(b));
}

inline int run() {
  int failed = 0;
  for (const Test& test : registry()) {
    bool passed = false;
    try {
      test.body();
      passed = true;
    } catch (const Failure&) {
    } catch (const std::exception& error) {
      std::printf("    threw %s: %s\n", typeid(error).name(), error.what());
    }
    failed += !passed;
    std::printf("%-6s %s\n", passed ? "ok" : "FAILED", test.name);
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed\n", static_cast<int>(registry().size()) - failed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                          \
  static void test_##name();                                                \
  static const check::Registration registration_##name(#name, test_##name); \
  static void test_##name()
#define PRIVTUNER_TEST_MAIN \
  int main() { return check::run(); }

#define CHECK_FAIL_(what) check::fail(__FILE__, __LINE__, what)
#define CHECK(condition) ((condition) ? void() : CHECK_FAIL_("not true: " #condition))
#define CHECK_RELATION_(a, b, op)                                                                                    \
  check::compare((a), (b), [](const auto& left_, const auto& right_) { return left_ op right_; }, #a " " #op " " #b, \
                 __FILE__, __LINE__)
#define CHECK_EQ(a, b) CHECK_RELATION_(a, b, ==)
#define CHECK_NE(a, b) CHECK_RELATION_(a, b, !=)
#define CHECK_LT(a, b) CHECK_RELATION_(a, b, <)
#define CHECK_LE(a, b) CHECK_RELATION_(a, b, <=)
// The expression throws exactly this type, and the message holds `part`.
#define CHECK_THROWS(type, expression, part)                                                                       \
  do {                                                                                                             \
    std::string message_ = "nothing of this type thrown";                                                          \
    bool thrown_ = false;                                                                                          \
    try {                                                                                                          \
      static_cast<void>(expression);                                                                               \
    } catch (const type& error_) {                                                                                 \
      thrown_ = typeid(error_) == typeid(type);                                                                    \
      message_ = error_.what();                                                                                    \
    }                                                                                                              \
    if (!thrown_ || message_.find(part) == std::string::npos) CHECK_FAIL_(#type ": " #expression ": " + message_); \
  } while (false)
