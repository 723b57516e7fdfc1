//! The program around [`block_proc`]: see there.

fn main() {
    let channel = ipc::helper::start();
    // One heap for all threads: more would be made with calls that the sealed policy does not have.
    // SAFETY: no other thread exists yet.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } != 1 {
        ipc::helper::die("mallopt(M_ARENA_MAX) failed");
    }
    block_proc::control::run(channel)
}
