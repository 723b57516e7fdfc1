//! The accelerator.

use super::probe::read;
use super::{Check, Weight};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const GET_API_VERSION: libc::c_ulong = 0xae00;
const CREATE_VM: libc::c_ulong = 0xae01;
const CHECK_EXTENSION: libc::c_ulong = 0xae03;
/// The only one there has been since 2007.
const API_VERSION: i32 = 12;
/// What -smp takes at most.
const MOST_VCPUS: i32 = 255;

/// Capabilities without which vcpu-proc does not start a machine.
const NEEDED: [(libc::c_ulong, &str); 10] = [
    (0, "irqchip"),
    (3, "user_memory"),
    (4, "set_tss_addr"),
    (7, "ext_cpuid"),
    (14, "mp_state"),
    (25, "irq_routing"),
    (32, "irqfd"),
    (36, "ioeventfd"),
    (37, "set_identity_map_addr"),
    (136, "immediate_exit"),
];
const MAX_VCPUS: libc::c_ulong = 66;
const TSC_DEADLINE_TIMER: libc::c_ulong = 72;
const SYNC_REGS: libc::c_ulong = 74;

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![processor(&read("/proc/cpuinfo"))];
    match open("/dev/kvm", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(kvm) => {
            checks.push(device(&kvm));
            checks.extend(capabilities(|number| ioctl(&kvm, CHECK_EXTENSION, number).unwrap_or(0)));
        }
        Err(errno) => checks.push(not_opened(errno)),
    }
    checks
}

fn not_opened(errno: Errno) -> Check {
    let remedy = match errno {
        Errno::EACCES | Errno::EPERM => "this user may not open it; add the user to its group (usually kvm)",
        Errno::ENOENT => "load the module kvm_intel or kvm_amd; in a virtual machine, nested virtualisation must be on",
        _ => "see the kernel's log",
    };
    Check::missing(
        "/dev/kvm",
        errno.desc(),
        Weight::Fatal,
        format!("no VM can run; {remedy}"),
    )
}

fn device(kvm: &OwnedFd) -> Check {
    const NAME: &str = "/dev/kvm";
    match ioctl(kvm, GET_API_VERSION, 0) {
        Ok(API_VERSION) => {}
        Ok(other) => {
            return Check::missing(
                NAME,
                format!("API version {other}, not {API_VERSION}"),
                Weight::Fatal,
                "no VM can run",
            );
        }
        Err(errno) => return not_opened(errno),
    }
    match ioctl(kvm, CREATE_VM, 0) {
        Ok(fd) => {
            // SAFETY: KVM_CREATE_VM returned a new fd, which is ours to close.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            Check::ok(NAME, format!("opens, API version {API_VERSION}, creates VMs"))
        }
        Err(errno) => Check::missing(
            NAME,
            format!("opens, but creates no VM: {}", errno.desc()),
            Weight::Fatal,
            "no VM can run; another hypervisor may hold the processor",
        ),
    }
}

/// Judges the capabilities that `value` tells: 0 for one that is not there.
fn capabilities(value: impl Fn(libc::c_ulong) -> i32) -> Vec<Check> {
    let absent: Vec<&str> = NEEDED
        .iter()
        .filter(|(number, _)| value(*number) <= 0)
        .map(|(_, name)| *name)
        .collect();
    let present: Vec<&str> = NEEDED.iter().map(|(_, name)| *name).collect();
    let needed = if absent.is_empty() {
        Check::ok("KVM capabilities", present.join(" "))
    } else {
        Check::missing(
            "KVM capabilities",
            format!("no {}", absent.join(" ")),
            Weight::Fatal,
            "no VM can run; a newer kernel has them",
        )
    };
    let vcpus = match value(MAX_VCPUS) {
        most if most >= MOST_VCPUS => Check::ok("vCPUs", format!("up to {most} by KVM, {MOST_VCPUS} by Bulkhead")),
        most => Check::limited(
            "vCPUs",
            format!("up to {most} by KVM"),
            Weight::Comfort,
            format!("-smp beyond {most} is refused"),
        ),
    };
    let sync_regs = if value(SYNC_REGS) > 0 {
        Check::ok("KVM sync regs", "registers stay readable when vcpu-proc is gone")
    } else {
        Check::missing(
            "KVM sync regs",
            "not offered",
            Weight::Comfort,
            "no registers in a post-mortem dump after vcpu-proc was killed",
        )
    };
    let timer = if value(TSC_DEADLINE_TIMER) > 0 {
        Check::ok("TSC deadline timer", "offered")
    } else {
        Check::missing(
            "TSC deadline timer",
            "not offered",
            Weight::Comfort,
            "guests program timers by slower exits",
        )
    };
    vec![needed, vcpus, sync_regs, timer]
}

/// Whether the processor runs guest kernels itself, from the text of /proc/cpuinfo.
fn processor(cpuinfo: &str) -> Check {
    const NAME: &str = "processor";
    let flags = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    let has = |wanted: &str| flags.split_whitespace().any(|flag| flag == wanted);
    if has("vmx") {
        Check::ok(NAME, "hardware virtualisation (Intel VT-x)")
    } else if has("svm") {
        Check::ok(NAME, "hardware virtualisation (AMD-V)")
    } else {
        Check::missing(
            NAME,
            "no hardware virtualisation (neither vmx nor svm in /proc/cpuinfo)",
            Weight::Comfort,
            "guest kernels are interpreted, and stock Linux guests cannot boot; switch VT-x or AMD-V on in the firmware, \
             or nested virtualisation in the hypervisor above",
        )
    }
}

fn ioctl(kvm: &OwnedFd, request: libc::c_ulong, argument: libc::c_ulong) -> nix::Result<i32> {
    // SAFETY: these requests take a number and touch no memory of ours.
    Errno::result(unsafe { libc::ioctl(kvm.as_raw_fd(), request, argument) })
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn virtualisation_is_told_from_the_flags_line() {
        let cases = [
            ("processor : 0\nflags\t\t: fpu vmx sse\n", State::Ok),
            ("flags\t\t: fpu svm\n", State::Ok),
            (
                "flags\t\t: fpu svm_lock\nvmx flags\t: vnmi\nmodel name : vmx\n",
                State::Missing,
            ),
            ("", State::Missing),
        ];
        for (text, wanted) in cases {
            assert_eq!(processor(text).state, wanted, "{text}");
        }
        assert!(processor("").has_weight(Weight::Comfort));
    }

    #[test]
    fn one_absent_capability_is_named_and_fatal() {
        let checks = capabilities(|number| if number == 32 { 0 } else { 1024 });
        assert_eq!(checks[0].found, "no irqfd");
        assert!(checks[0].has_weight(Weight::Fatal));
        assert!(checks[1..].iter().all(|check| check.state == State::Ok));
        assert!(capabilities(|_| 1024).iter().all(|check| check.state == State::Ok));
    }

    #[test]
    fn an_unopenable_device_says_what_to_do() {
        assert!(not_opened(Errno::EACCES).to_string().contains("group"));
        assert!(not_opened(Errno::ENOENT).to_string().contains("module"));
    }
}
