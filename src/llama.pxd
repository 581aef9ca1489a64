# The part of llama.h (and of ggml's headers) that we call, in their order. Calls that can assert or throw go through
# guard.hpp and carry `except +raise_fault`; the others return plain values and can do neither.
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.atomic cimport atomic
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.utility cimport pair
from libcpp.vector cimport vector

cdef extern from "llama.h" nogil:
    struct llama_vocab:
        pass
    struct llama_model:
        pass
    struct llama_context:
        pass
    struct llama_sampler:
        pass
    struct llama_memory_i:
        pass
    int LLAMA_STATE_SEQ_VERSION
    ctypedef llama_memory_i* llama_memory_t
    ctypedef int32_t llama_pos
    ctypedef int32_t llama_token
    ctypedef int32_t llama_seq_id

cdef extern from "guard.hpp" namespace "tea" nogil:
    void raise_fault()
    void install()
    void set_log_level "tea::log_level.store"(int level)
    string take_last_words()
    cppclass LogLine:
        int level
        string text
    bool take_log_line(LogLine& line)

    llama_model* load_model(const char* path, const llama_model_params& params) except +raise_fault
    llama_context* new_context(llama_model* model, const llama_context_params& params) except +raise_fault
    int32_t encode(llama_context* ctx, const llama_batch& batch) except +raise_fault
    int32_t decode(llama_context* ctx, const llama_batch& batch) except +raise_fault
    int32_t tokenize(const llama_vocab* vocab, const char* text, int32_t text_len, llama_token* tokens,
                     int32_t n_tokens_max, bool add_special, bool parse_special) except +raise_fault
    int32_t detokenize(const llama_vocab* vocab, const llama_token* tokens, int32_t n_tokens, char* text,
                       int32_t text_len_max, bool remove_special, bool unparse_special) except +raise_fault

cdef extern from "load_memory.hpp" namespace "tea" nogil:
    cppclass LoadMemory:
        LoadMemory(const char* path) except +
        void progress(float fraction)

cdef extern from "split_load.hpp" namespace "tea" nogil:
    cppclass SplitLoad:
        SplitLoad(const char* path, const llama_model_params& params) except +
        bool wait_ms(int ms)
        llama_model* take()

cdef extern from "text_filter.hpp" namespace "tea" nogil:
    bool ends_text(const llama_vocab* vocab, llama_token token)
    void read_piece(const llama_vocab* vocab, llama_token token, bool special, string& out) except +
    cppclass TextFilter:
        void add_stop(string stop) except +
        bool has_ready()
        const string& ready()
        void clear_ready()

cdef extern from "constraint.hpp" namespace "tea" nogil:
    cppclass Constraint:
        unique_ptr[Constraint] copy() except +raise_fault
    cppclass Triggers:
        vector[string] patterns
        vector[llama_token] tokens
    const char** llguidance_names
    size_t llguidance_size
    void set_llguidance(size_t i, size_t address)
    cppclass GuidedVocab:
        GuidedVocab(const llama_vocab* vocab) except +raise_fault
    unique_ptr[Constraint] new_gbnf(const llama_vocab* vocab, const char* grammar, const Triggers& triggers,
                                    const vector[llama_token]& markup, const string& prefix) except +raise_fault
    unique_ptr[Constraint] new_guided(const llama_vocab* vocab, const GuidedVocab& guided, const char* kind,
                                      const char* source) except +raise_fault

cdef extern from "thinking.hpp" namespace "tea" nogil:
    enum Binds:
        ALWAYS, AFTER_THINKING, WITH_ITS_END
    void add_thinking(unique_ptr[Constraint]& constraint, const llama_vocab* vocab, const string& start,
                      const vector[string]& ends, const string& begun, int32_t budget, Binds binds) except +raise_fault

cdef extern from "logprobs.hpp" namespace "tea" nogil:
    struct Logprob:
        llama_token token
        float logprob
    cppclass Logprobs:
        Logprobs(int32_t n_top) except +
        const vector[Logprob]& rows()

cdef extern from "sampling.hpp" namespace "tea" nogil:
    enum Head "tea::Head":
        NONE "tea::Head::NONE"
        TOP_K "tea::Head::TOP_K"
        TOP_P "tea::Head::TOP_P"
        MIN_P "tea::Head::MIN_P"
    cppclass Chain:
        llama_sampler* samplers
        int32_t n_edits
        bool greedy
        Head head
        int32_t k
        float top_p
        float min_p
        void reset()
        vector[llama_logit_bias] bias
        unique_ptr[Constraint] constraint
        vector[llama_sampler*] lookback

cdef extern from "prefix_cache.hpp" namespace "tea" nogil:
    struct PrefixCacheOptions "tea::PrefixCache::Options":
        int32_t n_seq
        bool reuse
        bool whole
        size_t n_kept_max
        size_t n_host_max
        llama_context* draft
    struct Known:
        vector[llama_token] tokens
        const char* state
        size_t n_bytes
    cppclass PrefixCache:
        size_t n_live()
        size_t n_kept()
        size_t n_host_bytes()

cdef extern from "log.h" nogil:
    void common_log_set_verbosity_thold(int verbosity)

cdef extern from "common.h" nogil:
    enum common_speculative_type:
        COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE, COMMON_SPECULATIVE_TYPE_DRAFT_MTP, COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE

cdef extern from "speculative.hpp" namespace "tea" nogil:
    struct SpeculatorOptions "tea::Speculator::Options":
        common_speculative_type type
        int32_t n_draft
        int32_t n_rows

cdef extern from "batch.hpp" namespace "tea" nogil:
    enum Finish:
        RUNNING, STOP, LENGTH, CANCELLED, NO_TOKEN, FAULT, UNFIT
    cppclass Text "tea::Generation":
        vector[llama_token] tokens
        size_t n_prompt
        int32_t n_max
        atomic[int32_t] n_generated
        Chain* chain
        int32_t n_lookback
        TextFilter filter
        vector[llama_token] markup
        unique_ptr[Logprobs] logprobs
        bool stream
        bool save
        vector[uint8_t] state
        size_t n_past
        Known known
        string unfit
        atomic[bool] cancelled
        atomic[Finish] finish
        string fault
        size_t n_cached
        bint cut
        size_t n_drafted
        size_t n_accepted
        int64_t begun_us
        int64_t first_us
        int64_t last_us
        bool has_news()
    cppclass Batch:
        Batch(llama_context* ctx, const llama_vocab* vocab, const PrefixCacheOptions& options, bool fill_fours,
              const SpeculatorOptions& speculation) except +raise_fault
        bool run(const vector[shared_ptr[Text]]& texts) except +raise_fault
        void wake()
        const PrefixCache& cache()

cdef extern from "common.h" nogil:
    enum common_grammar_trigger_type:
        COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN
        COMMON_GRAMMAR_TRIGGER_TYPE_WORD
        COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN
        COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL
    cppclass common_grammar_trigger:
        common_grammar_trigger_type type
        string value
        llama_token token

cdef extern from "chat.h" nogil:
    cppclass common_chat_params:
        string prompt
        string grammar
        bool grammar_lazy
        string generation_prompt
        bool supports_thinking
        string thinking_start_tag
        vector[string] thinking_end_tags
        vector[common_grammar_trigger] grammar_triggers
        vector[string] preserved_tokens
        vector[string] additional_stops

cdef extern from "control_texts.hpp" namespace "tea" nogil:
    cppclass ControlTexts:
        ControlTexts(const llama_vocab* vocab) except +
        vector[llama_token] tokenize(const string& text, const vector[pair[size_t, size_t]]& literal) except +raise_fault

cdef extern from "chat_template.hpp" namespace "tea" nogil:
    cppclass Rendered:
        string text
        vector[pair[size_t, size_t]] literal
    cppclass ChatTemplate:
        ChatTemplate(const llama_model* model, const string& source, const ControlTexts* controls) except +raise_fault
        common_chat_params apply(const string& request, Rendered& rendered) except +raise_fault

cdef extern from "chat_parser.hpp" namespace "tea" nogil:
    struct CallNews:
        size_t index
        string id
        string name
        string arguments
    struct ChatNews:
        string content
        string reasoning
        vector[CallNews] calls
    enum ChatTextEnd "tea::ChatParser::End":
        CHAT_OPEN "tea::ChatParser::OPEN"
        CHAT_WHOLE "tea::ChatParser::WHOLE"
        CHAT_CUT "tea::ChatParser::CUT"
    cppclass ChatText "tea::ChatParser":
        ChatText(const common_chat_params& prompt) except +raise_fault
        bool is_plain() except +raise_fault
        bool reads_calls() except +raise_fault
        ChatNews read(const string& piece, ChatTextEnd end) except +raise_fault
        const string& unread()

cdef extern from "ggml-cpu.h" nogil:
    struct ggml_threadpool_params:
        pass
    struct ggml_threadpool:
        pass
    ggml_threadpool_params ggml_threadpool_params_default(int n_threads)
    ggml_threadpool* ggml_threadpool_new(ggml_threadpool_params* params)
    void ggml_threadpool_free(ggml_threadpool* threadpool)
    void ggml_threadpool_pause(ggml_threadpool* threadpool)

cdef extern from "ggml-backend.h" nogil:
    struct ggml_backend_device:
        pass
    size_t ggml_backend_dev_count()
    ggml_backend_device* ggml_backend_dev_get(size_t index)
    const char* ggml_backend_dev_name(ggml_backend_device* device)
    const char* ggml_backend_dev_description(ggml_backend_device* device)
    void ggml_backend_dev_memory(ggml_backend_device* device, size_t* free, size_t* total)

cdef extern from "llama.h" nogil:
    enum llama_pooling_type:
        LLAMA_POOLING_TYPE_UNSPECIFIED
        LLAMA_POOLING_TYPE_NONE
        LLAMA_POOLING_TYPE_MEAN
        LLAMA_POOLING_TYPE_CLS
        LLAMA_POOLING_TYPE_LAST
        LLAMA_POOLING_TYPE_RANK
    enum llama_context_type:
        LLAMA_CONTEXT_TYPE_MTP
    enum llama_flash_attn_type:
        LLAMA_FLASH_ATTN_TYPE_AUTO
        LLAMA_FLASH_ATTN_TYPE_DISABLED
        LLAMA_FLASH_ATTN_TYPE_ENABLED
    enum llama_load_mode:
        LLAMA_LOAD_MODE_AUTO
        LLAMA_LOAD_MODE_NONE
        LLAMA_LOAD_MODE_MMAP
        LLAMA_LOAD_MODE_MLOCK
        LLAMA_LOAD_MODE_MMAP_MLOCK

    ctypedef bool (*llama_progress_callback)(float progress, void* user_data) noexcept nogil
    ctypedef bool (*ggml_abort_callback)(void* data) noexcept nogil

    struct llama_batch:
        int32_t n_tokens
        llama_token* token
        float* embd
        llama_pos* pos
        int32_t* n_seq_id
        llama_seq_id** seq_id
        int8_t* logits

    struct llama_model_params:
        int32_t n_gpu_layers
        llama_load_mode load_mode
        llama_progress_callback progress_callback
        void* progress_callback_user_data
        bool vocab_only
        bool check_tensors
        bool load_mtp

    struct llama_context_params:
        uint32_t n_ctx
        uint32_t n_batch
        uint32_t n_ubatch
        uint32_t n_seq_max
        uint32_t n_rs_seq
        uint32_t n_outputs_max
        int32_t n_threads
        int32_t n_threads_batch
        llama_context_type ctx_type
        llama_pooling_type pooling_type
        llama_flash_attn_type flash_attn_type
        int type_k
        int type_v
        bool embeddings
        bool no_perf
        bool swa_full
        bool kv_unified
        llama_context* ctx_other

    struct llama_logit_bias:
        llama_token token
        float bias
    struct llama_sampler_chain_params:
        bool no_perf

    const char* llama_version_bytes "llama_version"()
    llama_model_params llama_model_default_params()
    llama_context_params llama_context_default_params()
    llama_sampler_chain_params llama_sampler_chain_default_params()
    void llama_backend_init()
    void llama_attach_threadpool(llama_context* ctx, ggml_threadpool* threadpool, ggml_threadpool* threadpool_batch)
    void llama_detach_threadpool(llama_context* ctx)
    void llama_model_free(llama_model* model)
    void llama_free(llama_context* ctx)
    bool llama_supports_gpu_offload()
    uint32_t llama_n_ctx(const llama_context* ctx)
    uint32_t llama_n_batch(const llama_context* ctx)
    void llama_set_abort_callback(llama_context* ctx, ggml_abort_callback callback, void* data)
    llama_memory_t llama_get_memory(const llama_context* ctx)
    llama_pooling_type llama_get_pooling_type "llama_pooling_type"(const llama_context* ctx)
    const llama_vocab* llama_model_get_vocab(const llama_model* model)
    int32_t llama_model_n_ctx_train(const llama_model* model)
    int32_t llama_model_n_embd_out(const llama_model* model)
    int32_t llama_model_n_layer(const llama_model* model)
    int32_t llama_model_n_head_kv(const llama_model* model)
    int32_t llama_vocab_n_tokens(const llama_vocab* vocab)
    int32_t llama_model_n_swa(const llama_model* model)
    int32_t llama_model_meta_count(const llama_model* model)
    int32_t llama_model_meta_key_by_index(const llama_model* model, int32_t i, char* buf, size_t buf_size)
    int32_t llama_model_meta_val_str_by_index(const llama_model* model, int32_t i, char* buf, size_t buf_size)
    int32_t llama_model_desc(const llama_model* model, char* buf, size_t buf_size)
    uint64_t llama_model_size(const llama_model* model)
    const char* llama_model_chat_template(const llama_model* model, const char* name)
    uint64_t llama_model_n_params(const llama_model* model)
    bool llama_model_has_encoder(const llama_model* model)
    bool llama_model_has_decoder(const llama_model* model)
    uint32_t llama_n_rs_seq(const llama_context* ctx)
    bool llama_model_is_recurrent(const llama_model* model)
    bool llama_model_is_hybrid(const llama_model* model)
    void llama_memory_clear(llama_memory_t mem, bool data)
    float* llama_get_embeddings_seq(llama_context* ctx, llama_seq_id seq_id)
    bool llama_vocab_is_control(const llama_vocab* vocab, llama_token token)
    const llama_token* llama_vocab_get_suppress_tokens(const llama_vocab* vocab, int32_t* n_suppress_tokens)
    llama_token llama_vocab_fim_pre(const llama_vocab* vocab)
    llama_token llama_vocab_fim_suf(const llama_vocab* vocab)
    llama_token llama_vocab_fim_mid(const llama_vocab* vocab)
    llama_token llama_vocab_fim_rep(const llama_vocab* vocab)
    llama_token llama_vocab_fim_sep(const llama_vocab* vocab)
    llama_token llama_vocab_bos(const llama_vocab* vocab)
    llama_token llama_vocab_eos(const llama_vocab* vocab)
    llama_token llama_vocab_eot(const llama_vocab* vocab)
    bool llama_vocab_get_add_bos(const llama_vocab* vocab)
    llama_sampler* llama_sampler_chain_init(llama_sampler_chain_params params)
    void llama_sampler_chain_add(llama_sampler* chain, llama_sampler* sampler)
    int32_t llama_sampler_chain_n(const llama_sampler* chain)
    llama_sampler* llama_sampler_init_greedy()
    llama_sampler* llama_sampler_init_dist(uint32_t seed)
    llama_sampler* llama_sampler_init_top_k(int32_t k)
    llama_sampler* llama_sampler_init_top_p(float p, size_t min_keep)
    llama_sampler* llama_sampler_init_min_p(float p, size_t min_keep)
    llama_sampler* llama_sampler_init_typical(float p, size_t min_keep)
    llama_sampler* llama_sampler_init_temp(float t)
    llama_sampler* llama_sampler_init_temp_ext(float t, float delta, float exponent)
    llama_sampler* llama_sampler_init_xtc(float p, float t, size_t min_keep, uint32_t seed)
    llama_sampler* llama_sampler_init_top_n_sigma(float n)
    llama_sampler* llama_sampler_init_mirostat(int32_t n_vocab, uint32_t seed, float tau, float eta, int32_t m)
    llama_sampler* llama_sampler_init_mirostat_v2(uint32_t seed, float tau, float eta)
    llama_sampler* llama_sampler_init_penalties(int32_t n_vocab, int32_t penalty_last_n, float penalty_repeat,
                                                float penalty_freq, float penalty_present)
    llama_sampler* llama_sampler_init_dry(const llama_vocab* vocab, float dry_multiplier, float dry_base,
                                          int32_t dry_allowed_length, int32_t dry_penalty_last_n,
                                          const char** seq_breakers, size_t num_breakers)
    llama_sampler* llama_sampler_init_adaptive_p(float target, float decay, uint32_t seed)
    llama_sampler* llama_sampler_init_infill(const llama_vocab* vocab)
    const char* llama_print_system_info()
