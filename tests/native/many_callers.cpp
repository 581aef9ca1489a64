// One thread computes a batch (src/batch.hpp) while others hand it texts, cancel and wake: to be built with
// -fsanitize=thread (ci/test-native --races), which reports what two threads touch at once. Every text that was not
// cancelled must be the one that is computed alone. Arguments: a model, seconds.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "batch.hpp"

namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

struct Setting {
    const char * what;
    uint32_t n_cells;
    tea::PrefixCache::Options cache;
    bool fill_fours;
};

const Setting settings[] = {  // n_seq, reuse, whole, n_kept_max, n_host_max
    {"room for all", 4096, {12, true, false, 512, 0}, false},
    {"texts wait for cells, kept ones go into host memory", 384, {8, true, false, 64, 4 << 20}, true},
    {"more texts than sequences", 1024, {3, true, false, 256, 1 << 20}, false},
    {"texts share nothing, as recurrent models want it", 1024, {8, true, true, 256, 4 << 20}, false},
    {"host memory holds two long texts", 1536, {4, true, false, 1024, 300 << 10}, false},
};

std::string times(int n, const std::string & text) {
    std::string all;
    for (; n > 0; --n) all += text;
    return all;
}

const std::string prompts[] = {
    "Once upon a time, there was a little girl named Lily.",
    "Once upon a time, there was a little girl named Lily. She loved to play outside with her red ball. One day, she saw "
    "a big dog. The dog wanted the ball. Lily said, \"No, it is my ball!\" The dog was sad.",
    "Tom and his mom went to the park.",
    "Tom",
    times(10, "The big dog was happy. "),
    times(18, "Tom ran to the park. "),  // long enough to be taken back from host memory
    times(18, "Lily ran to the park. "),
    times(18, "Ben ran to the park. "),
    times(18, "Mom ran to the park. "),
};
constexpr size_t n_prompts = std::size(prompts);
constexpr int32_t n_longest = 120;  // tokens to generate

struct Caller : tea::Generation {  // and what its thread waits for
    tea::Chain own_chain;
    std::string text;  // written by the thread that computes, read when `done`
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
};

class Server {
  public:
    Server(llama_model * model, const Setting & setting) : vocab_(llama_model_get_vocab(model)) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx = setting.n_cells;
        params.n_batch = params.n_ubatch = 32;
        params.n_seq_max = setting.cache.n_seq + setting.fill_fours;
        params.n_outputs_max = params.n_seq_max + 2;
        params.n_threads = params.n_threads_batch = 2;
        params.kv_unified = true;
        ctx_ = llama_init_from_model(model, params);
        auto threads = ggml_threadpool_params_default(2);
        threads_ = ggml_threadpool_new(&threads);
        llama_attach_threadpool(ctx_, threads_, threads_);
        batch_ = std::make_unique<tea::Batch>(ctx_, vocab_, setting.cache, setting.fill_fours);
        thread_ = std::thread([this] { serve(); });
    }

    ~Server() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            closed_ = true;
        }
        changed_.notify_one();
        thread_.join();
        batch_.reset();
        llama_detach_threadpool(ctx_);
        llama_free(ctx_);
        ggml_threadpool_free(threads_);
    }

    std::shared_ptr<Caller> ask(const std::string & prompt, int32_t n_max, bool stream) {
        auto caller = std::make_shared<Caller>();
        caller->tokens.resize(512);
        caller->tokens.resize(llama_tokenize(vocab_, prompt.data(), static_cast<int32_t>(prompt.size()), caller->tokens.data(), 512, true, false));
        caller->n_prompt = caller->tokens.size();
        caller->n_max = n_max;
        caller->stream = stream;
        caller->own_chain.greedy = true;
        caller->chain = &caller->own_chain;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            waiting_.push_back(caller);
        }
        batch_->wake();
        changed_.notify_one();
        return caller;
    }

    void wake() { batch_->wake(); }

  private:
    void serve() {
        tea::Batch::Generations live;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                changed_.wait(lock, [&] { return closed_ || !waiting_.empty() || !live.empty(); });
                if (closed_) return;
                for (; !waiting_.empty(); waiting_.erase(waiting_.begin())) live.push_back(waiting_.front());
            }
            try {
                if (!batch_->run(live)) throw std::runtime_error("texts that nobody knows hold all sequences");
            } catch (const std::exception & e) {
                std::printf("FAILED: %s (%s)\n", e.what(), tea::take_last_words().c_str());
                std::_Exit(1);
            }
            for (size_t i = 0; i < live.size();) {
                Caller & caller = static_cast<Caller &>(*live[i]);
                caller.text += caller.filter.ready();
                caller.filter.clear_ready();
                if (caller.finish == tea::RUNNING) {
                    ++i;
                    continue;
                }
                {
                    const std::lock_guard<std::mutex> lock(caller.mutex);
                    caller.done = true;
                }
                caller.changed.notify_all();
                live.erase(live.begin() + i);
            }
            if (live.empty()) ggml_threadpool_pause(threads_);
        }
    }

    const llama_vocab * vocab_;
    llama_context * ctx_;
    ggml_threadpool * threads_;
    std::unique_ptr<tea::Batch> batch_;
    std::mutex mutex_;
    std::condition_variable changed_;
    tea::Batch::Generations waiting_;
    bool closed_ = false;
    std::thread thread_;
};

bool wait(Caller & caller, std::chrono::milliseconds patience) {
    std::unique_lock<std::mutex> lock(caller.mutex);
    return caller.changed.wait_for(lock, patience, [&] { return caller.done; });
}

std::atomic<int> n_failed{0}, n_right{0}, n_cut{0}, n_cancelled{0};

void fail(const char * where, const std::string & why) {
    ++n_failed;
    std::printf("FAILED with %s: %s\n", where, why.c_str());
}

void call(Server & server, const Setting & setting, const std::map<std::pair<size_t, int32_t>, std::string> & alone, unsigned seed, Clock::time_point end) {
    std::mt19937 random(seed);
    while (Clock::now() < end) {
        const size_t which = random() % n_prompts;
        const int32_t n_max = random() % 4 == 0 ? n_longest : 30;
        const auto caller = server.ask(prompts[which], n_max, random() % 2);
        if (random() % 4 == 0) {
            wait(*caller, std::chrono::milliseconds(random() % 60));
            caller->cancelled.store(true);
            if (random() % 2) server.wake();
        }
        if (!wait(*caller, 120s)) {
            fail(setting.what, "a text did not end");
            std::exit(1);
        }
        const std::string & whole = alone.at({which, n_max});
        const tea::Finish finish = caller->finish;
        const bool is_cut = finish == tea::CANCELLED || (finish == tea::LENGTH && caller->n_generated < n_max);
        if (is_cut ? whole.compare(0, caller->text.size(), caller->text) != 0 : whole != caller->text) {
            fail(setting.what, "'" + caller->text + "' instead of '" + whole + "'");
        }
        if (finish == tea::FAULT || finish == tea::NO_TOKEN) fail(setting.what, "a text failed: " + caller->fault);
        ++(finish == tea::CANCELLED ? n_cancelled : is_cut ? n_cut : n_right);
    }
}

}  // namespace

int main(int n_arguments, char ** arguments) {
    if (n_arguments != 3) {
        std::puts("usage: many_callers MODEL SECONDS");
        return 2;
    }
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    tea::install();
    llama_model * model = llama_model_load_from_file(arguments[1], llama_model_default_params());
    if (!model) return 2;

    std::map<std::pair<size_t, int32_t>, std::string> alone;
    for (size_t which = 0; which < n_prompts; ++which) {
        for (const int32_t n_max : {30, n_longest}) {
            Server server(model, {"one text", 1024, {1, false, false, 0, 0}, false});
            const auto caller = server.ask(prompts[which], n_max, false);
            wait(*caller, 120s);
            alone[{which, n_max}] = caller->text;
        }
    }
    const auto share = std::chrono::milliseconds(static_cast<int64_t>(std::atof(arguments[2]) * 1000 / std::size(settings)));
    for (const Setting & setting : settings) {
        n_right = n_cut = n_cancelled = 0;
        Server server(model, setting);
        const auto end = Clock::now() + share;
        std::vector<std::thread> callers;
        for (unsigned seed = 0; seed < 10; ++seed) {
            callers.emplace_back([&, seed] { call(server, setting, alone, seed, end); });
        }
        callers.emplace_back([&] {
            for (; Clock::now() < end; std::this_thread::sleep_for(3ms)) server.wake();
        });
        for (auto & caller : callers) caller.join();
        std::printf("%s: %d right, %d cut short for want of cells, %d cancelled\n", setting.what, n_right.load(), n_cut.load(), n_cancelled.load());
    }
    llama_model_free(model);
    std::printf(n_failed ? "%d checks failed\n" : "all right\n", n_failed.load());
    return n_failed > 0;
}
