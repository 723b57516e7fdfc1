//! No command line does harm: whatever the arguments hold, the answer is an invocation or one line of error.
//!
//! The lines come from a fixed sequence of pseudo-random numbers, so a failure repeats. They are made of the parser's own
//! words, of pieces that tend to break parsers, and of plain noise; otherwise nearly all would end at the first argument.

use super::super::options::{Action, OPTIONS};
use super::{Invocation, parse};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

const LINES: u32 = 40_000;

const AWKWARD: &[&[u8]] = &[
    b"",
    b",",
    b",,",
    b"=",
    b"-",
    b"--",
    b"no",
    b"on",
    b"off",
    b"help",
    b"?",
    b"/",
    b"/a",
    b"a",
    b"a,,b",
    b":",
    b"kvm",
    b"host",
    b"+x",
    b"-x",
    b"0",
    b"1",
    b"1.",
    b".5",
    b"1.5G",
    b"255",
    b"256",
    b"4T",
    b"18446744073709551616",
    b"0x10",
    b"-1",
    b"unix:",
    b"unix:/s,server",
    b"file:",
    b"chardev:a",
    b"stdio",
    b"socket",
    b"id=a",
    b"fd=3",
    b"fd=2147483648",
    b"mode=control",
    b"if=virtio",
    b"format=raw",
    b"file=a",
    b"\xff",
    b"\xc3\xa9",
    b"\xf0\x9f\x98\x80",
    b"\0",
    b"\n",
    b"\x1b[31m",
    b"00112233-4455-6677-8899-aabbccddeeff",
    b"doctor",
    b"virtio-rng-pci",
    b"virtio-blk-pci",
    b"iothread",
    b"throttle-group",
    b"secret",
    b"id=b",
    b"drive=a",
    b"rng=a",
    b"addr=1f",
    b"data=x",
    b"limits.iops-total=5",
    b"{\"driver\":\"virtio-rng-pci\"}",
    b"{\"qom-type\":\"iothread\",\"id\":\"a\"}",
];

/// Marsaglia's xorshift64.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).expect("31 bits") % limit
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    fn piece(&mut self, into: &mut Vec<u8>) {
        if self.below(8) == 0 {
            for _ in 0..self.below(12) {
                into.push(u8::try_from(self.below(256)).expect("a byte"));
            }
        } else {
            into.extend_from_slice(self.pick::<&[u8]>(AWKWARD));
        }
    }

    /// An option and a value with keys that it knows.
    fn option(&mut self, arguments: &mut Vec<OsString>) {
        let option = self.pick(OPTIONS);
        let mut name = if self.below(4) == 0 {
            b"--".to_vec()
        } else {
            b"-".to_vec()
        };
        name.extend_from_slice(self.pick(option.names).as_bytes());
        arguments.push(OsString::from_vec(name));
        let mut value = Vec::new();
        for _ in 0..self.below(5) {
            if let Action::Pairs(keys, _) | Action::Accept(keys) = &option.action
                && self.below(3) > 0
            {
                value.extend_from_slice(self.pick(keys.keys).name.as_bytes());
                value.push(b'=');
            }
            self.piece(&mut value);
            if self.below(3) > 0 {
                value.push(b',');
            }
        }
        if option.takes_value() || self.below(20) == 0 {
            arguments.push(OsString::from_vec(value));
        }
    }

    fn line(&mut self) -> Vec<OsString> {
        let mut arguments = Vec::new();
        for _ in 0..self.below(5) {
            if self.below(10) == 0 {
                let mut noise = Vec::new();
                self.piece(&mut noise);
                self.piece(&mut noise);
                arguments.push(OsString::from_vec(noise));
            } else {
                self.option(&mut arguments);
            }
        }
        if self.below(2) == 0 {
            arguments.extend(["-kernel".into(), "k".into()]);
        }
        arguments
    }
}

#[test]
fn arbitrary_arguments_give_a_machine_an_answer_or_one_line_of_error() {
    let mut numbers = Numbers(0x2545_f491_4f6c_dd1d);
    let (mut machines, mut answers, mut refusals) = (0, 0, 0);
    for _ in 0..LINES {
        let line = numbers.line();
        match parse(line.clone().into_iter()) {
            Ok(Invocation::Run(machine)) => {
                assert!(
                    machine.ram_bytes >= 1 << 20 && machine.ram_bytes % 4096 == 0,
                    "{line:?}"
                );
                let topology = machine.topology;
                let product = u32::from(topology.sockets) * u32::from(topology.cores) * u32::from(topology.threads);
                assert_eq!(product, u32::from(topology.vcpus), "{line:?}");
                machines += 1;
            }
            Ok(_) => answers += 1,
            Err(error) => {
                let error = error.to_string();
                assert!(
                    !error.is_empty() && !error.contains(char::is_control),
                    "{line:?}\n{error:?}"
                );
                refusals += 1;
            }
        }
    }
    // The generator reaches all three.
    assert!(
        machines > 100 && answers > 100 && refusals > 1000,
        "{machines} {answers} {refusals}"
    );
}
