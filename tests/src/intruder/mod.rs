//! Somebody who has taken a process of a machine over, and one end of a channel with it.
//!
//! What an attacker inside a helper can say, the test says: the process is stopped, its end of the channel is taken as root
//! takes it (pidfd_getfd), and from then on the test reads the requests and answers as it likes. The process that was
//! there before is the real one, so the handshake was real and the supervisor trusts it as far as it trusts any. The other
//! way round the supervisor is stopped, and the real, sealed helper hears what the test says.
//!
//! - [`rng`], [`generate`], [`frames`], [`descriptors`]: what is said.
//! - [`attempts`]: what is tried from inside.
//! - [`code`]: what is done from inside, by the kernel's word.
//! - [`scene`]: a machine in which it is tried.
//! - [`seclusion`]: where nobody else hears it.
//! - [`victim`]: which process, and how its channel is found.
//! - [`player`]: a helper that answers with anything.
//! - [`onto_supervisor`], [`onto_helper`]: whole runs, which count what they did.

pub mod attempts;
pub mod code;
pub mod descriptors;
pub mod frames;
pub mod generate;
pub mod onto_helper;
pub mod onto_supervisor;
pub mod player;
pub mod rng;
pub mod scene;
pub mod seclusion;
pub mod victim;

/// Returns from the test, and says why, when it is not run by root: nobody else may take descriptors of others.
#[macro_export]
macro_rules! need_root {
    () => {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
    };
}
