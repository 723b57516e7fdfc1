//! Trying things in a child process, reading what the kernel says about itself, and the two checks that need no more.

use super::{Check, Weight};
use ipc::Role;
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{AccessFlags, ForkResult, access, fork, pipe};

/// First Linux with everything that has no fallback: clone3, close_range, filters for all threads that report to a
/// listener.
const OLDEST_KERNEL: (u32, u32) = (5, 9);

/// Which step of an attempt failed, and why.
pub(super) type StepResult = Result<(), (&'static str, Errno)>;

/// Runs `attempt` in a child, which ends afterwards. The closure must not allocate or lock: the process may have threads.
///
/// `steps` are the names that the attempt may give for its steps.
pub(super) fn in_child(steps: &[&'static str], attempt: impl FnOnce() -> StepResult) -> StepResult {
    let (reader, writer) = pipe().map_err(|errno| ("pipe", errno))?;
    // SAFETY: the child makes system calls only (see above) and leaves by _exit.
    match unsafe { fork() }.map_err(|errno| ("fork", errno))? {
        ForkResult::Child => {
            if let Err((step, errno)) = attempt() {
                let index = steps.iter().position(|name| *name == step).unwrap_or(steps.len());
                let [a, b, c, d] = (errno as i32).to_le_bytes();
                let _ = nix::unistd::write(&writer, &[index as u8, a, b, c, d]);
            }
            // SAFETY: ends the process.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(writer);
            let mut answer = [0; 5];
            let length = nix::unistd::read(&reader, &mut answer).unwrap_or(0);
            match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, 0)) if length == 0 => Ok(()),
                Ok(WaitStatus::Exited(..)) if length == answer.len() => {
                    let [index, errno @ ..] = answer;
                    let step = steps.get(usize::from(index)).copied().unwrap_or("attempt");
                    Err((step, Errno::from_raw(i32::from_le_bytes(errno))))
                }
                _ => Err(("attempt was killed", Errno::EPERM)),
            }
        }
    }
}

/// A file's text, or nothing when it cannot be read.
pub(super) fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

pub(super) fn kernel() -> Check {
    const NAME: &str = "kernel";
    let release =
        nix::sys::utsname::uname().map_or_else(|_| String::new(), |name| name.release().to_string_lossy().into_owned());
    let (major, minor) = OLDEST_KERNEL;
    match version(&release) {
        Some(version) if version >= OLDEST_KERNEL => Check::ok(NAME, format!("Linux {release}")),
        Some(_) => Check::missing(
            NAME,
            format!("Linux {release}"),
            Weight::Fatal,
            format!("helpers cannot be started; Linux {major}.{minor} is the oldest that can"),
        ),
        None => Check::limited(
            NAME,
            format!("its release {release:?} is no version number"),
            Weight::Comfort,
            format!("unknown; Linux {major}.{minor} or newer is needed"),
        ),
    }
}

/// Major and minor number of a release such as `6.1.0-13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The helpers' executables lie beside this one.
pub(super) fn helpers() -> Check {
    const NAME: &str = "helper programs";
    let program = std::env::current_exe().unwrap_or_default();
    let directory = program.parent().unwrap_or(std::path::Path::new("/"));
    let absent: Vec<&str> = Role::ALL
        .iter()
        .map(|role| role.name())
        .filter(|name| access(&directory.join(name), AccessFlags::X_OK).is_err())
        .collect();
    if absent.is_empty() {
        return Check::ok(NAME, format!("all in {}", directory.display()));
    }
    Check::missing(
        NAME,
        format!("no {} in {}", absent.join(", "), directory.display()),
        Weight::Fatal,
        "no VM can run; install them beside the bulkhead program",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions_are_understood() {
        let cases = [
            ("6.1.0-13-amd64", Some((6, 1))),
            ("5.10.0", Some((5, 10))),
            ("6.18.44-fc-v769", Some((6, 18))),
            ("7.0-rc1", Some((7, 0))),
            ("", None),
            ("six", None),
        ];
        for (release, wanted) in cases {
            assert_eq!(version(release), wanted, "{release}");
        }
    }

    #[test]
    fn a_child_tells_the_step_that_failed() {
        assert_eq!(in_child(&["a", "b"], || Ok(())), Ok(()));
        assert_eq!(
            in_child(&["a", "b"], || Err(("b", Errno::EACCES))),
            Err(("b", Errno::EACCES))
        );
    }
}
