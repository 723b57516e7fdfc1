//! A supervisor for tests: starts vcpu-proc bare, builds a machine on the real /dev/kvm, and runs hand-assembled guests.
#![allow(dead_code)] // Every test binary uses its own part.

use bulkhead_tests::bare::Bare;
use ipc::Failure;
use ipc::caps::{ChardevFd, GuestMemRw, InitrdFd, KernelFd, KvmFd};
use ipc::vcpu::{CpuFeature, CpuTopology, KernelFormat, VcpuEvent, VcpuRegisters, VcpuReply, VcpuRequest, VcpuSetup};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub type Helper = Bare<VcpuRequest, VcpuReply, VcpuEvent>;

/// Where flat guests are loaded; their code starts 16 bytes further.
pub const LOAD: u64 = 0x20_0000;
/// RAM of most guests.
pub const RAM: u64 = 64 << 20;

/// /dev/kvm, or `None` with a line that says so.
pub fn kvm() -> Option<OwnedFd> {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Some(file.into()),
        Err(error) => {
            eprintln!("skipped: /dev/kvm: {error}");
            None
        }
    }
}

/// A helper that has been asked nothing yet.
pub fn start() -> Helper {
    Bare::start(env!("CARGO_BIN_EXE_vcpu-proc"))
}

/// Guest RAM of that size.
pub fn memory(bytes: u64) -> File {
    let file = File::from(memfd_create("guest-ram", MFdFlags::MFD_CLOEXEC).expect("memfd_create"));
    file.set_len(bytes).expect("ftruncate");
    file
}

/// A machine with a serial port, sealed.
pub struct Vm {
    pub helper: Helper,
    /// The memfd.
    pub ram: File,
    /// Other end of the serial port.
    pub serial: UnixStream,
    pub thread_ids: Vec<i32>,
    _listener: ipc::caps::SeccompListener,
}

pub fn setup_request(kvm: OwnedFd, ram: &File, vcpus: u16, cpu_features: Vec<CpuFeature>) -> VcpuRequest {
    VcpuRequest::Setup(VcpuSetup {
        kvm: KvmFd::new(kvm),
        memory: GuestMemRw::new(ram.try_clone().expect("dup").into()),
        ram_bytes: ram.metadata().expect("fstat").len(),
        vcpus,
        topology: CpuTopology {
            cores: vcpus.max(1),
            threads: 1,
        },
        cpu_features,
        serial: true,
        vmcoreinfo: true,
    })
}

impl Vm {
    pub fn new(vcpus: u16) -> Option<Self> {
        Self::with(vcpus, RAM, |_| {})
    }

    /// `add` adds devices before the seal.
    pub fn with(vcpus: u16, ram_bytes: u64, add: impl FnOnce(&mut Helper)) -> Option<Self> {
        let kvm = kvm()?;
        let mut helper = start();
        let ram = memory(ram_bytes);
        helper.ask(setup_request(kvm, &ram, vcpus, Vec::new())).expect("Setup");
        add(&mut helper);
        let VcpuReply::Sealed {
            listener, thread_ids, ..
        } = helper.ask(VcpuRequest::Seal).expect("Seal")
        else {
            panic!("not sealed");
        };
        let (serial, theirs) = UnixStream::pair().expect("socketpair");
        serial
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("SO_RCVTIMEO");
        helper
            .ask(VcpuRequest::AttachSerial {
                input: Some(ChardevFd::new(theirs.try_clone().expect("dup").into())),
                output: Some(ChardevFd::new(theirs.into())),
                datagrams: false,
            })
            .expect("AttachSerial");
        Some(Self {
            helper,
            ram,
            serial,
            thread_ids,
            _listener: listener,
        })
    }

    pub fn try_boot(
        &mut self,
        kernel: &[u8],
        initrd: Option<&[u8]>,
        command_line: &str,
    ) -> Result<KernelFormat, Failure> {
        let request = VcpuRequest::Boot {
            kernel: KernelFd::new(file(kernel)),
            initrd: initrd.map(|contents| InitrdFd::new(file(contents))),
            command_line: command_line.to_owned(),
        };
        self.helper.ask(request).map(|reply| match reply {
            VcpuReply::Booted { format } => format,
            other => panic!("{other:?}"),
        })
    }

    /// Boots a flat guest made of that code.
    pub fn boot(&mut self, code: &[u8]) {
        let format = self.try_boot(&flat(code), None, "").expect("Boot");
        assert_eq!(format, KernelFormat::Flat);
    }

    pub fn done(&mut self, request: VcpuRequest) {
        match self.helper.ask(request) {
            Ok(VcpuReply::Done) => {}
            other => panic!("{other:?}"),
        }
    }

    pub fn run(&mut self) {
        self.done(VcpuRequest::Run);
    }

    pub fn pause(&mut self) {
        self.done(VcpuRequest::Pause);
    }

    pub fn registers(&mut self) -> Vec<VcpuRegisters> {
        match self.helper.ask(VcpuRequest::GetRegisters) {
            Ok(VcpuReply::Registers(registers)) => registers,
            other => panic!("{other:?}"),
        }
    }

    /// The next bytes that the guest writes to its serial port.
    pub fn read_serial(&mut self, bytes: usize) -> String {
        let mut text = vec![0; bytes];
        if let Err(error) = self.serial.read_exact(&mut text) {
            panic!(
                "nothing on the serial port: {error}; log: {:?}",
                self.helper.log_lines()
            );
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// A quadword of guest RAM.
    pub fn ram_u64(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        self.ram.read_exact_at(&mut bytes, address).expect("reading the memfd");
        u64::from_le_bytes(bytes)
    }
}

/// An unnamed file.
pub fn file(contents: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(contents).expect("writing it");
    file.into()
}

/// A flat image.
pub fn flat(code: &[u8]) -> Vec<u8> {
    let mut image = b"BHFLAT64".to_vec();
    image.extend(LOAD.to_le_bytes());
    image.extend(code);
    image
}

/// Machine code, piece by piece.
#[derive(Default)]
pub struct Code(pub Vec<u8>);

impl Code {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// mov dx, port; mov al, value; out dx, al
    pub fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    /// mov dx, port; in al, dx
    pub fn input(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xec])
    }

    /// Writes text to the serial port.
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(0x3f8, byte))
    }

    /// Writes al to the serial port.
    pub fn print_al(self) -> Self {
        self.bytes(&[0x66, 0xba, 0xf8, 0x03, 0xee])
    }

    /// mov rax, address; inc qword [rax]; jmp to the inc
    pub fn count_forever(self, address: u64) -> Self {
        self.bytes(&[0x48, 0xb8])
            .bytes(&address.to_le_bytes())
            .bytes(&[0x48, 0xff, 0x00, 0xeb, 0xfb])
    }

    /// cli; hlt; jmp to the hlt
    pub fn halt(self) -> Self {
        self.bytes(&[0xfa, 0xf4, 0xeb, 0xfd])
    }
}
