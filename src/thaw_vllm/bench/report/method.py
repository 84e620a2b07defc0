"""The part of docs/benchmarks.md that says how the figures come about; it changes when the benchmarks do."""

METHOD = """
This page is made by `thaw bench report` from `benchmarks/results/*.jsonl`; nothing in it is written by hand but the
notes, which are in [benchmarks-notes.md](benchmarks-notes.md). Every table names its command (those of other runs are
in the same files): run it and add a line with `--record`.

## Method

**One run, one comparison.** Limits, thaw and rivals are measured in the same run on the same machine, and ratios are
taken within it only. The order of the systems turns with every round.

**Fresh processes.** Each run of each system is a process of its own. Before the clock starts it has imported
everything and its CUDA context is up. A round's processes do that together; afterwards each runs alone while the others
wait for a line of input. Warm restores (`restore-warm`) are the exception, since a process that stays is their point:
one process, pinned once (the seconds that took are recorded too), several restores.

**What is counted.** From the call to the moment the device has finished: opening files, reading headers, staging memory
and its registration, the copies, the checksums where it says *verified*. thaw and thaw-native fill tensors that exist
already, as in an engine, so those are allocated before the clock. The other systems make their tensors themselves, as
part of their call, and that counts. On the host, safetensors hands out mappings of its files; they are cloned, so that
it ends with memory like the others. A freeze ends when the file has been synced, whoever did not sync it himself.

**The model** has the shapes of Llama 3 8B (291 tensors, 16.06 GB in bfloat16, smaller with `--size-gb`), random bits.
The rivals read it as safetensors shards of up to 5 GB, thaw as one `.thaw`, thaw-native as the file it froze itself.

**Cold is proved.** Before a cold run the files are synced and dropped from the page cache, and the kernel is asked how
much of them is still there (`cachestat`, else `mincore`): over 1 % and the run does not count. Before a warm one they
are read until at least 99 % is there. Both shares are in the record. What a hypervisor or a storage box caches cannot
be seen from inside.

**Equal is checked after the clock,** for every tensor of every run: a 64-bit sum of all words, each weighted by its
position, with dtype and shape, computed where the tensor lies and compared with the source's. Tensors that are filled
in place hold a pattern beforehand, so that bytes which nobody wrote are found. Frozen files are read back and compared;
thaw's own are verified chunk by chunk as well.

**Host memory** is watched from outside: anonymous and shared memory of the process beyond what it held when the clock
started, without pages of files, and on the host without the restored tensors themselves. Page-locked memory that the
driver allocates itself (`cudaHostAlloc`) is in no process's account; the growth of the whole machine is recorded beside
it (`machine_mib`).

**Limits.** `h2d` and `d2h`: 16 MiB copies from and to a region in huge pages, touched and registered. `disk-read` and
`disk-write`: direct I/O of 8 MiB by all threads, fsync included. `tmpfs-write`: a new file by `pwrite` of all threads,
and by stores into a shared mapping; the faster counts. `memory-read`: all threads read a file in memory into small
buffers. Memory is touched before it is measured, because a fresh virtual machine gets its memory from the host only at
the first touch, several times slower. A limit is what this method reached, not what a data sheet promises.

**KV caches** (`thaw bench kv`). One engine in a process of its own, warmed up with other tokens of the longest length,
answers each prompt of random tokens with nothing cached (`ttft-cold`) and again from its prefix cache (`ttft-prefix`),
and freezes that cache to a file (`kv-freeze`). A fresh engine, warmed up alike, restores the file into its empty prefix
cache (`kv-restore`, every page verified), a compressed copy likewise (`kv-restore-compressed`), and answers
(`ttft-thawed`). All seconds are those of the caller of
`vllm.LLM`, from the call to its return; a first token is a request for one. The runs of a length are repeats in the
same engine, with its prefix cache emptied in between; the first restore counts among them and is in the record
(`first_s`), for the first length with helpers and page-locked memory still to be made. Held against each other are the
pages of the file and of a second one that the fresh engine froze of what it had restored, byte by byte, the number of
cached tokens, and the 16 tokens of a greedy answer with their log-probabilities, from the prefix cache and from the
thawed one. A cold prefill rounds differently than one that finds its prefix cached, thaw or not; how far those answers
are apart is in the record too.

**Forks** (`thaw bench fork`). One engine gives the first tokens of N continuations of a trunk of random tokens, each
work with nothing cached before: as N requests whose salts keep them from sharing blocks (`fork-prefills`), as N
requests of the same prompt with vLLM's prefix cache (`fork-prefix`), both given at once, and by `thaw_vllm.fork`
(`fork`). It keeps the trunk as a session in an empty store (`checkpoint`). A fresh engine takes the session up with an
empty prefix cache (`session-restore`, every block verified), and forks what it restored (`fork-thawed`). Seconds are
those of the caller, until the last of the N first tokens; each continuation has a seed of its own, the same in every
work. Both engines have forked other tokens of the longest length before. Held against each other are the pages of a
file that the first engine froze of the trunk and of one that the fresh engine froze of what it had restored, byte by
byte, and how many tokens of every continuation were cached. Whether the same seeds gave the same tokens is in the
record (`tokens_equal`); how requests meet in a step changes roundings, so nothing fails by it. With a snapshot, a fork
pool of warm engines then continues each trunk, kept as a session of its store, in rounds of 4 continuations of 64
tokens (`fork-pool`), from the call to the last continuation, once each engine has brought the trunk back. The first
round is in the record (`first_s`), with the engines' number, whether they share one copy of the weights, and how much
of the GPU's memory the pool took (`gpu_mib`, nvidia-smi's).

**Swaps and parking** (`thaw bench swap`). One engine, started from a snapshot with sleep mode, takes the weights of
another and its own again, in turn (`swap`): from the file, and from memory that it has page-locked before. It is parked
and woken (`park`, `wake`), and the same by vLLM's own sleep, level 1, which keeps weights in host memory. Seconds of
`swap` and `wake` are those of the caller of `vllm.LLM`, from the call to the first token of a prompt of 60 tokens.
Memory in use before parking and meanwhile is nvidia-smi's, of the whole GPU. After each, a greedy answer of 16 tokens
with their log-probabilities must be the one that these weights gave before; where they gave two different ones, nothing
is said.

**Figures.** GB/s are decimal, of the model's bytes, from the median of the runs. *Spread* is the difference of the
slowest and the fastest run over the median, and how many runs there were. *Of the limit* is the speed over that of the
slowest part that the bytes must pass: the link, and for a cold disk or a freeze the medium too; on the host, reads of
the file in memory into small buffers, which no restore can quite reach.
"""
