// Stands in for pybind11, so that csrc/bindings.cpp becomes a table of functions that read their arguments from text.
#pragma once

#include <array>
#include <concepts>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace pybind11 {

// The arguments of a call: numbers, strings (- is the empty one), @i+n for the address of byte n of buffer i, and none.
class Arguments {
public:
    Arguments(std::istream& text, const std::vector<char*>& buffers) : text_(text), buffers_(buffers) {}

    void read(std::string& value) {
        value = next();
        if (value == "-")
            value.clear();
    }
    void read(double& value) {
        const std::string word = next();
        value = std::strtod(word.c_str(), nullptr);
    }
    template <std::integral T>
    void read(T& value) {
        const std::string word = next();
        if (word[0] != '@') {
            value = static_cast<T>(std::stoll(word));
            return;
        }
        const size_t plus = word.find('+');
        value = static_cast<T>(reinterpret_cast<intptr_t>(buffers_.at(std::stoul(word.substr(1, plus - 1)))) +
                               std::stoll(word.substr(plus)));
    }
    template <class T, size_t n>
    void read(std::array<T, n>& values) {
        for (T& value : values)
            read(value);
    }
    template <class T>
    void read(std::optional<T>& value) {
        const auto here = text_.tellg();
        if (next() == "none") {
            value.reset();
            return;
        }
        text_.seekg(here);
        read(value.emplace());
    }
    void end() {
        std::string word;
        if (text_ >> word)
            throw std::runtime_error("an argument too many: " + word);
    }

private:
    std::string next() {
        std::string word;
        if (!(text_ >> word))
            throw std::runtime_error("too few arguments");
        return word;
    }

    std::istream& text_;
    const std::vector<char*>& buffers_;
};

inline std::string text_of(const std::string& text) {
    return text;
}
inline std::string text_of(const std::vector<std::string>& words) {
    std::string text;
    for (const std::string& word : words)
        text += (text.empty() ? "" : " ") + word;
    return text;
}

struct gil_scoped_release {};
template <class>
struct call_guard {};
struct tuple {
    template <class T>
    explicit tuple(const T&) {}
};
template <class T>
const T& cast(const T& value) {
    return value;
}

class module_ {
public:
    struct Attribute {
        template <class T>
        void operator=(const T&) {}
    };
    std::string& doc() { return doc_; }
    Attribute attr(const char*) { return {}; }

    template <class F, class... Rest>
    void def(const char* name, F function, const Rest&...) {
        add(name, std::function(function));
    }
    std::string call(const std::string& name, Arguments& arguments) const { return functions_.at(name)(arguments); }

private:
    template <class R, class... A>
    void add(const char* name, std::function<R(A...)> function) {
        functions_[name] = [function](Arguments& arguments) -> std::string {
            std::tuple<std::decay_t<A>...> values;
            std::apply([&](auto&... value) { (arguments.read(value), ...); }, values);
            arguments.end();
            if constexpr (std::is_void_v<R>) {
                std::apply(function, values);
                return "";
            } else
                return text_of(std::apply(function, values));
        };
    }

    std::string doc_;
    std::map<std::string, std::function<std::string(Arguments&)>> functions_;
};

} // namespace pybind11

void fill(pybind11::module_& m);
#define PYBIND11_MODULE(name, m) void fill(pybind11::module_& m)
