// Serves the functions of csrc/bindings.cpp to tests/arm_machine.py over standard input and output.
//
// A request is a line and then the bytes of its buffers: the function's name, the number of buffers, the size of each,
// the arguments. The answer is a line, "ok" and the result or "error" and a message, then the bytes of the buffers.
#include <pybind11/pybind11.h>

#include <cstdio>
#include <exception>
#include <iostream>
#include <memory>
#include <sstream>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
// In the place of OpenMP's runtime, whose waiting the thread sanitizer does not see.
extern "C" void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i)
        others.emplace_back(body, context);
    body(context);
    for (std::thread& other : others)
        other.join();
}
#endif

int main() {
    pybind11::module_ module;
    fill(module);
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream text(line);
        std::string name, answer;
        size_t count = 0;
        text >> name >> count;
        std::vector<size_t> sizes(count);
        // Every buffer ends where its allocation ends.
        std::vector<std::unique_ptr<char[]>> memory;
        std::vector<char*> buffers;
        for (size_t& size : sizes) {
            text >> size;
            buffers.push_back(memory.emplace_back(new char[size]).get());
        }
        for (size_t i = 0; i < count; ++i)
            if (!std::cin.read(buffers[i], std::streamsize(sizes[i])))
                return 1;
        try {
            pybind11::Arguments arguments(text, buffers);
            answer = "ok " + module.call(name, arguments);
        } catch (const std::exception& error) {
            answer = std::string("error ") + error.what();
        }
        std::cout << answer << '\n';
        for (size_t i = 0; i < count; ++i)
            std::cout.write(buffers[i], std::streamsize(sizes[i]));
        std::cout.flush();
    }
}
