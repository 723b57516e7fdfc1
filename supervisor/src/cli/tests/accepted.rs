//! Lines that describe a machine, and which.

use super::drives::{disk, file_of};
use super::{Invocation, invocation, machine, parse};
use crate::config::{
    AllowSource, AutomaticDump, BlockDevice, Board, CharBackend, Device, Families, FdSetId, Guest, Inet, InheritedFd,
    Model, Monitor, RestartBudget, Socket, SocketAddress, SocketRole, Topology, VmConfig, VmCoreInfoDevice,
};
use crate::graph::options::Aio;
use crate::logging::Format;
use ipc::action::{Actions, HelperLossAction, PanicAction, RebootAction, ShutdownAction, WatchdogAction};
use ipc::narrowing::Allow;
use ipc::opener::TcpOptions;
use ipc::qmp::DumpFormat;
use ipc::vcpu::CpuFeature;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

/// The machine of `-kernel k -nodefaults`.
fn bare() -> VmConfig {
    VmConfig {
        name: None,
        uuid: None,
        ram_bytes: 128 << 20,
        topology: Topology {
            vcpus: 1,
            sockets: 1,
            cores: 1,
            threads: 1,
        },
        cpu_features: Vec::new(),
        board: Board::Pc,
        guest: Some(Guest {
            kernel: "k".into(),
            initrd: None,
            command_line: String::new(),
        }),
        blockdevs: Vec::new(),
        drives: Vec::new(),
        objects: Vec::new(),
        memory_backend: None,
        spare_io_threads: 2,
        devices: Vec::new(),
        is_qtest: false,
        frontends: vec![],
        empty_drives: vec![],
        vmcoreinfo: None,
        allowed_paths: Vec::new(),
        fds: Vec::new(),
        serial: None,
        serial_label: "serial0".into(),
        qtest: None,
        chardevs: Vec::new(),
        monitors: Vec::new(),
        start_paused: false,
        actions: Actions::default(),
        dump_on_panic: None,
        dump_on_crash: None,
        pidfile: None,
        daemonize: false,
        require_sandbox: false,
        restart_budget: RestartBudget::default(),
        policy_mode: policies::Mode::Enforce,
        uid_base: None,
        cgroup: None,
        metrics: None,
        log_format: Format::Text,
    }
}

fn guest(vm: &mut VmConfig) -> &mut Guest {
    vm.guest.as_mut().unwrap()
}

#[test]
fn without_a_guest_there_is_no_kernel_to_name() {
    let empty = machine("-machine none");
    assert_eq!(
        (empty.board, empty.guest, empty.topology.vcpus, empty.ram_bytes),
        (Board::Empty, None, 0, 0)
    );
    let line = "-nodefaults -accel qtest -smp 2 -m 64M -drive file=a,if=virtio,format=raw";
    let quiet = machine(line);
    assert_eq!((quiet.board, quiet.guest, quiet.ram_bytes), (Board::Pc, None, 64 << 20));
    assert_eq!((quiet.topology.vcpus, quiet.frontends.len()), (2, 1));
    assert!(machine("-kernel k -machine accel=kvm:qtest").guest.is_some());
}

fn socket(address: SocketAddress, role: SocketRole) -> CharBackend {
    CharBackend::Socket(Socket {
        address,
        role,
        options: TcpOptions::default(),
    })
}

fn server(path: &str, wait: bool) -> CharBackend {
    socket(SocketAddress::Unix(path.into()), SocketRole::Server { wait })
}

fn client(path: &str) -> CharBackend {
    socket(SocketAddress::Unix(path.into()), SocketRole::Client { reconnect: None })
}

fn tcp_server(host: &str, port: u16, wait: bool) -> CharBackend {
    socket(SocketAddress::Inet(Inet::new(host, port)), SocketRole::Server { wait })
}

fn tcp_client(host: &str, port: u16, reconnect_ms: u64) -> CharBackend {
    let reconnect = (reconnect_ms > 0).then(|| Duration::from_millis(reconnect_ms));
    socket(
        SocketAddress::Inet(Inet::new(host, port)),
        SocketRole::Client { reconnect },
    )
}

fn inherited(fd: i32, listening: bool) -> CharBackend {
    let role = if listening {
        SocketRole::Server { wait: false }
    } else {
        SocketRole::Client { reconnect: None }
    };
    socket(SocketAddress::Inherited(fd), role)
}

fn file(path: &str) -> CharBackend {
    CharBackend::File {
        path: path.into(),
        input: None,
        append: false,
    }
}

fn feature(name: &str, on: bool) -> CpuFeature {
    CpuFeature { name: name.into(), on }
}

#[test]
fn what_a_lost_helper_and_a_broken_policy_lead_to_can_be_said() {
    let quiet = machine("-kernel k");
    assert_eq!(quiet.actions.helper_loss, HelperLossAction::Pause);
    assert_eq!(
        (quiet.dump_on_crash, quiet.policy_mode),
        (None, policies::Mode::Enforce)
    );
    let loud = machine("-kernel k -action helper-loss=shutdown -dump-on-crash file:core,format=elf --policy-mode log");
    assert_eq!(loud.actions.helper_loss, HelperLossAction::Shutdown);
    assert_eq!(loud.dump_on_crash.unwrap().format, DumpFormat::Elf);
    assert_eq!((loud.dump_on_panic, loud.policy_mode), (None, policies::Mode::Log));
}

#[test]
fn a_dump_on_panic_is_a_plain_file_that_every_reader_opens_unless_told_otherwise() {
    let wanted = |line: &str| machine(&format!("-kernel k {line}")).dump_on_panic.unwrap();
    let plain = AutomaticDump {
        path: "core".into(),
        format: DumpFormat::KdumpRawZlib,
    };
    for line in ["-dump-on-panic file:core", "-dump-on-panic protocol=file:core"] {
        assert_eq!(wanted(line), plain, "{line}");
    }
    let lzo = wanted("-dump-on-panic file:core,format=kdump-lzo");
    assert_eq!(lzo.format, DumpFormat::KdumpLzo);
}

#[test]
fn a_full_line_of_an_operator_is_understood() {
    let line = "-name guest=web,debug-threads=on -m 2G -smp 4 -cpu host,+avx2,-pmu -machine q35,accel=kvm -enable-kvm \
                -kernel /boot/vmlinuz -initrd /boot/initrd.img -append 'console=ttyS0 root=/dev/vda' \
                -drive file=/srv/web.img,if=virtio,format=raw,cache=none,aio=native,discard=unmap,serial=W1,num-queues=2 \
                -serial unix:/run/web.serial,server=on,wait=off -qmp unix:/run/web.qmp,server,nowait \
                -uuid 00112233-4455-6677-8899-aabbccddeeff -pidfile /run/web.pid -daemonize -no-reboot -no-shutdown -S \
                -dump-on-panic file:/srv/web,,core,format=elf --require-sandbox";
    let mut web = disk("virtio0", "/srv/web.img");
    web.node.common.direct = Some(true);
    web.node.common.discard = Some(true);
    file_of(&mut web).engine = Some(Aio::Native);
    web.serial = "W1".into();
    web.queues = Some(2);
    let expected = VmConfig {
        name: Some("web".into()),
        uuid: Some([
            0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
        ]),
        ram_bytes: 2 << 30,
        topology: Topology {
            vcpus: 4,
            sockets: 1,
            cores: 4,
            threads: 1,
        },
        cpu_features: vec![feature("avx2", true), feature("pmu", false)],
        board: Board::Pc,
        guest: Some(Guest {
            kernel: "/boot/vmlinuz".into(),
            initrd: Some("/boot/initrd.img".into()),
            command_line: "console=ttyS0 root=/dev/vda".into(),
        }),
        blockdevs: Vec::new(),
        drives: vec![web],
        objects: Vec::new(),
        memory_backend: None,
        spare_io_threads: 2,
        is_qtest: false,
        frontends: Vec::new(),
        empty_drives: Vec::new(),
        vmcoreinfo: None,
        devices: vec![Device {
            id: None,
            slot: 1,
            model: Model::Block(BlockDevice {
                drive: "virtio0".into(),
                io_thread: None,
                queues: 2,
                queue_size: 256,
                serial: "W1".into(),
                boot_index: None,
                write_cache: None,
                read_error: None,
                write_error: None,
            }),
        }],
        allowed_paths: Vec::new(),
        fds: Vec::new(),
        serial: Some(server("/run/web.serial", false)),
        serial_label: "serial0".into(),
        qtest: None,
        chardevs: Vec::new(),
        monitors: vec![Monitor {
            backend: server("/run/web.qmp", false),
            label: "compat_monitor0".into(),
            pretty: false,
            allow: AllowSource::Given(Allow::All),
        }],
        start_paused: true,
        actions: Actions {
            reboot: RebootAction::Shutdown,
            shutdown: ShutdownAction::Pause,
            ..Actions::default()
        },
        dump_on_panic: Some(AutomaticDump {
            path: "/srv/web,core".into(),
            format: DumpFormat::Elf,
        }),
        dump_on_crash: None,
        pidfile: Some("/run/web.pid".into()),
        daemonize: true,
        require_sandbox: true,
        restart_budget: RestartBudget::default(),
        policy_mode: policies::Mode::Enforce,
        uid_base: None,
        cgroup: None,
        metrics: None,
        log_format: Format::Text,
    };
    assert_eq!(machine(line), expected);
}

#[test]
fn one_dash_or_two_is_the_same() {
    assert_eq!(
        machine("--kernel k --nodefaults --m 1G -M q35"),
        machine("-kernel k -nodefaults -m 1G -machine q35")
    );
}

/// Lines that change one thing of the bare machine.
#[test]
fn single_options_mean_what_qemu_means() {
    type Change = fn(&mut VmConfig);
    let cases: &[(&str, Change)] = &[
        ("", |_| {}),
        ("-name web", |vm| vm.name = Some("web".into())),
        ("-name a,,b=c", |vm| vm.name = Some("a,b=c".into())),
        ("-name a -name b", |vm| vm.name = Some("b".into())),
        ("-m 512", |vm| vm.ram_bytes = 512 << 20),
        ("-m 512M", |vm| vm.ram_bytes = 512 << 20),
        ("-m size=2G", |vm| vm.ram_bytes = 2 << 30),
        ("-m size=131072k,slots=0", |vm| vm.ram_bytes = 128 << 20),
        ("-m 1G,maxmem=1G", |vm| vm.ram_bytes = 1 << 30),
        ("-m 1.5G", |vm| vm.ram_bytes = 3 << 29),
        ("-m 2000001b", |vm| vm.ram_bytes = 2_002_944),
        ("-m 4T", |vm| vm.ram_bytes = 4 << 40),
        ("-m 1", |vm| vm.ram_bytes = 1 << 20),
        ("-m 1G -m 2G", |vm| vm.ram_bytes = 2 << 30),
        ("-smp 2 -smp threads=2", |vm| {
            vm.topology = Topology {
                vcpus: 2,
                sockets: 1,
                cores: 1,
                threads: 2,
            };
        }),
        ("-cpu host", |_| {}),
        ("-cpu max", |_| {}),
        ("-cpu host,migratable=on,host-phys-bits=on,check=off", |_| {}),
        ("-cpu host,avx2=off,sse4_1=on,sha-ni", |vm| {
            vm.cpu_features = vec![feature("avx2", false), feature("sse4-1", true), feature("sha-ni", true)];
        }),
        ("-cpu host,+avx2 -cpu host,-pmu", |vm| {
            vm.cpu_features = vec![feature("pmu", false)]
        }),
        ("-machine bulkhead", |_| {}),
        (
            "-machine type=q35,accel=kvm:tcg,usb=off,vmport=off,dump-guest-core=off,kernel-irqchip=on,hpet=off",
            |_| {},
        ),
        ("-machine q35 -machine accel=kvm", |_| {}),
        ("-accel kvm", |_| {}),
        ("-accel kvm,thread=multi -accel tcg", |_| {}),
        ("-enable-kvm -accel tcg", |_| {}),
        ("-cpu host,kvm=off,sse4.1=on,+sse4_1", |vm| {
            vm.cpu_features = vec![feature("kvm", false), feature("sse4-1", true)];
        }),
        ("-initrd i -initrd j", |vm| guest(vm).initrd = Some("j".into())),
        ("-append -x", |vm| guest(vm).command_line = "-x".into()),
        ("-append ''", |_| {}),
        ("-kernel a,b=c", |vm| guest(vm).kernel = "a,b=c".into()),
        ("-no-reboot", |vm| vm.actions.reboot = RebootAction::Shutdown),
        ("-action reboot=shutdown", |vm| {
            vm.actions.reboot = RebootAction::Shutdown
        }),
        ("-no-reboot -action reboot=reset", |_| {}),
        ("-action shutdown=pause,watchdog=none", |vm| {
            vm.actions.shutdown = ShutdownAction::Pause;
            vm.actions.watchdog = WatchdogAction::None;
        }),
        ("-action panic=exit-failure", |vm| {
            vm.actions.panic = PanicAction::ExitFailure
        }),
        ("-action panic=pause -action panic=none,reboot=reset", |vm| {
            vm.actions.panic = PanicAction::None
        }),
        ("-action watchdog=inject-nmi", |vm| {
            vm.actions.watchdog = WatchdogAction::InjectNmi
        }),
        (
            "-display none -vga none -monitor none -parallel none -nic none -net none",
            |_| {},
        ),
        ("-monitor null", |_| {}),
        (
            "-no-user-config -msg timestamp=on -rtc base=utc,clock=host -boot strict=on",
            |_| {},
        ),
        ("-overcommit mem-lock=off,cpu-pm=off", |_| {}),
        ("-sandbox on", |_| {}),
        (
            "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            |_| {},
        ),
        ("-pidfile p", |vm| vm.pidfile = Some("p".into())),
        ("-S", |vm| vm.start_paused = true),
        ("-add-fd fd=5,set=0 -add-fd set=7,fd=5,opaque=r:/a,,b=c", |vm| {
            let entry = |set, opaque: Option<&str>| InheritedFd {
                fd: 5,
                set: FdSetId::new(set).unwrap(),
                opaque: opaque.map(str::to_owned),
            };
            vm.fds = vec![entry(0, None), entry(7, Some("r:/a,b=c"))];
        }),
    ];
    for (line, change) in cases {
        let mut expected = bare();
        change(&mut expected);
        assert_eq!(machine(&format!("-kernel k -nodefaults {line}")), expected, "{line}");
    }
}

#[test]
fn the_serial_port_without_serial_is_where_qemu_has_it() {
    let cases = [
        ("", Some(CharBackend::Null)),
        ("-nographic", Some(CharBackend::Stdio)),
        ("-nodefaults", None),
        ("-nodefaults -nographic", None),
        ("-serial none", None),
        ("-nographic -serial none", None),
        ("-nographic -serial null", Some(CharBackend::Null)),
        ("-nodefaults -serial stdio", Some(CharBackend::Stdio)),
    ];
    for (line, expected) in cases {
        assert_eq!(machine(&format!("-kernel k {line}")).serial, expected, "{line}");
    }
}

#[test]
fn serial_backends() {
    let cases = [
        ("-serial stdio", CharBackend::Stdio),
        ("-serial null", CharBackend::Null),
        ("-serial pty", CharBackend::Pty),
        ("-serial file:/a,b", file("/a,b")),
        (
            "-chardev file,id=c,path=/f,append=on,input-path=/i -serial chardev:c",
            CharBackend::File {
                path: "/f".into(),
                input: Some("/i".into()),
                append: true,
            },
        ),
        ("-serial pipe:/p", CharBackend::Pipe("/p".into())),
        (
            "-chardev pipe,id=c,path=/p -serial chardev:c",
            CharBackend::Pipe("/p".into()),
        ),
        ("-chardev ringbuf,id=c -serial chardev:c", CharBackend::Ring(65536)),
        ("-chardev ringbuf,id=c,size=8 -serial chardev:c", CharBackend::Ring(8)),
        (
            "-chardev ringbuf,id=c,size=1M -serial chardev:c",
            CharBackend::Ring(1 << 20),
        ),
        ("-serial tcp::4444,server=on,wait=off", tcp_server("", 4444, false)),
        ("-serial tcp:[::1]:4444", tcp_client("::1", 4444, 0)),
        (
            "-chardev socket,id=c,host=localhost,port=0,server=on -serial chardev:c",
            tcp_server("localhost", 0, true),
        ),
        ("-serial unix:/s", client("/s")),
        ("-serial unix:/s,server=off", client("/s")),
        ("-serial unix:/s,server=on", server("/s", true)),
        ("-serial unix:/s,server,wait", server("/s", true)),
        ("-serial unix:/s,server=on,wait=off", server("/s", false)),
        ("-serial unix:/s,server,nowait", server("/s", false)),
        ("-serial unix:path=/s,server=yes,wait=no", server("/s", false)),
        ("-serial unix:/s=,,t,server=on,wait=off", server("/s=,t", false)),
        ("-serial chardev:c -chardev file,id=c,path=/f", file("/f")),
        ("-chardev pty,id=c -serial chardev:c", CharBackend::Pty),
        ("-chardev null,id=c,mux=off -serial chardev:c", CharBackend::Null),
        ("-chardev stdio,id=c -serial chardev:c", CharBackend::Stdio),
        (
            "-chardev socket,id=c,path=/s,server=on,wait=off -serial chardev:c",
            server("/s", false),
        ),
        ("-chardev backend=socket,id=c,path=/s -serial chardev:c", client("/s")),
        ("-serial tcp:h:4444,reconnect=2", tcp_client("h", 4444, 2000)),
        (
            "-chardev socket,id=c,host=h,port=4,reconnect-ms=50 -serial chardev:c",
            tcp_client("h", 4, 50),
        ),
        (
            "-chardev socket,id=c,host=h,port=4,to=9,server=on,wait=off,ipv6=off,nodelay=on -serial chardev:c",
            CharBackend::Socket(Socket {
                address: SocketAddress::Inet(Inet {
                    last_port: 9,
                    families: Families::V4,
                    ..Inet::new("h", 4)
                }),
                role: SocketRole::Server { wait: false },
                options: TcpOptions {
                    no_delay: true,
                    keep_alive: false,
                },
            }),
        ),
        (
            "-serial udp::4555",
            CharBackend::Udp {
                remote: Inet::new("localhost", 4555),
                local: None,
            },
        ),
        (
            "-serial udp:[::1]:4555@:4556",
            CharBackend::Udp {
                remote: Inet::new("::1", 4555),
                local: Some(Inet::new("", 4556)),
            },
        ),
        (
            "-chardev udp,id=c,port=4555,localaddr=127.0.0.1 -serial chardev:c",
            CharBackend::Udp {
                remote: Inet::new("localhost", 4555),
                local: Some(Inet::new("127.0.0.1", 0)),
            },
        ),
        ("-chardev socket,fd=7,id=c -serial chardev:c", inherited(7, false)),
    ];
    for (line, expected) in cases {
        assert_eq!(machine(&format!("-kernel k {line}")).serial, Some(expected), "{line}");
    }
}

#[test]
fn devices_are_called_by_their_id_or_as_qemu_calls_them() {
    let line = "-kernel k -chardev null,id=spare -chardev stdio,id=c -serial chardev:c -chardev socket,id=m,path=/m \
                -qmp unix:/a -mon m,mode=control -qmp unix:/b";
    let machine = machine(line);
    assert_eq!(machine.serial_label, "c");
    let labels: Vec<_> = machine.monitors.iter().map(|monitor| &monitor.label[..]).collect();
    assert_eq!(labels, ["compat_monitor0", "m", "compat_monitor1"]);
    assert_eq!(machine.chardevs, [("spare".to_owned(), CharBackend::Null)]);
}

#[test]
fn vmcoreinfo_keeps_its_place_among_the_devices() {
    let vmcoreinfo = |line: &str| machine(&format!("-kernel k {line}")).vmcoreinfo;
    let device = |id: Option<&str>, place| {
        Some(VmCoreInfoDevice {
            id: id.map(str::to_owned),
            place,
        })
    };
    assert_eq!(vmcoreinfo(""), None);
    assert_eq!(vmcoreinfo("-device vmcoreinfo"), device(None, 0));
    let line = "-device virtio-rng-pci -device vmcoreinfo,id=v -device virtio-rng-pci";
    assert_eq!(vmcoreinfo(line), device(Some("v"), 1));
    let json = r#"-device {"driver":"vmcoreinfo","id":"w"}"#;
    assert_eq!(vmcoreinfo(json), device(Some("w"), 0));
}

#[test]
fn monitors_in_all_forms() {
    let fd = inherited;
    let cases: &[(&str, &[(CharBackend, bool)])] = &[
        ("", &[]),
        ("-qmp none -qmp null", &[]),
        ("-chardev null,id=c -mon c,mode=control", &[]),
        ("-qmp stdio", &[(CharBackend::Stdio, false)]),
        ("-qmp-pretty stdio", &[(CharBackend::Stdio, true)]),
        ("-qmp unix:/q,server=on,wait=off", &[(server("/q", false), false)]),
        (
            "-qmp unix:/q,server,nowait -qmp-pretty unix:/r",
            &[(server("/q", false), false), (client("/r"), true)],
        ),
        ("-qmp chardev:c -chardev stdio,id=c", &[(CharBackend::Stdio, false)]),
        (
            "-mon chardev=c,mode=control,pretty=on -chardev socket,id=c,path=/q,server=on",
            &[(server("/q", true), true)],
        ),
        // The iotests' harness.
        (
            "-display none -vga none -chardev socket,id=mon,fd=5 -mon chardev=mon,mode=control",
            &[(fd(5, false), false)],
        ),
        // libvirt.
        (
            "-chardev socket,id=charmonitor,fd=19,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control",
            &[(fd(19, true), false)],
        ),
    ];
    for (line, expected) in cases {
        let monitors = machine(&format!("-kernel k {line}")).monitors;
        let all = AllowSource::Given(Allow::All);
        assert!(monitors.iter().all(|monitor| monitor.allow == all), "{line}");
        let monitors: Vec<_> = monitors
            .into_iter()
            .map(|monitor| (monitor.backend, monitor.pretty))
            .collect();
        assert_eq!(&monitors[..], *expected, "{line}");
    }
}

#[test]
fn monitors_with_fewer_commands() {
    let only = |names: &[&str]| {
        let names = names.iter().map(|name| (*name).to_owned());
        AllowSource::Given(Allow::Only(names.collect()))
    };
    for (line, expected) in [
        ("-qmp unix:/q,allow=stop", only(&["stop"])),
        (
            "-qmp unix:/q,server=on,wait=off,allow=stop:cont",
            only(&["cont", "stop"]),
        ),
        (
            "-chardev stdio,id=c -mon c,mode=control,allow=query-status",
            only(&["query-status"]),
        ),
        (
            "-qmp-pretty unix:/q,allow=/etc/list:x",
            AllowSource::File("/etc/list:x".into()),
        ),
        (
            "-chardev stdio,id=c -mon c,mode=control,allow=./a,,b",
            AllowSource::File("./a,b".into()),
        ),
    ] {
        let machine = machine(&format!("-kernel k {line}"));
        assert_eq!(machine.monitors[0].allow, expected, "{line}");
    }
    let machine = machine("-kernel k -qmp unix:/q,allow=read-only:stop");
    let AllowSource::Given(allow) = &machine.monitors[0].allow else {
        panic!()
    };
    assert!(allow.permits("query-status") && allow.permits("stop") && !allow.permits("cont"));
}

#[test]
fn file_names_need_not_be_utf8() {
    let odd = |prefix: &str, suffix: &str| {
        let bytes = [prefix.as_bytes(), b"/\xff\xfe", suffix.as_bytes()].concat();
        OsString::from_vec(bytes)
    };
    let arguments = [
        "-kernel".into(),
        odd("", ""),
        "-initrd".into(),
        odd("", ""),
        "-pidfile".into(),
        odd("", ""),
        "-drive".into(),
        odd("file=", ",if=virtio,format=raw"),
        "-serial".into(),
        odd("file:", ""),
        "-qmp".into(),
        odd("unix:", ",server=on,wait=off"),
    ];
    let Ok(Invocation::Run(machine)) = parse(arguments.into_iter()) else {
        panic!("refused")
    };
    let path = PathBuf::from(odd("", ""));
    let guest = machine.guest.as_ref().unwrap();
    assert_eq!(guest.kernel, path);
    assert_eq!(guest.initrd.as_ref(), Some(&path));
    assert_eq!(machine.pidfile.as_ref(), Some(&path));
    assert_eq!(machine.drives[0].node.first_path(), Some(path.as_path()));
    assert_eq!(
        machine.serial,
        Some(CharBackend::File {
            path: path.clone(),
            input: None,
            append: false
        })
    );
    assert_eq!(
        machine.monitors[0].backend,
        socket(SocketAddress::Unix(path), SocketRole::Server { wait: false })
    );
}

#[test]
fn questions_are_answered_without_a_machine() {
    for (line, expected) in [
        ("doctor", Invocation::Doctor),
        ("doctor --help", Invocation::Help),
        ("-h", Invocation::Help),
        ("-help", Invocation::Help),
        ("--help", Invocation::Help),
        ("-m 1G --help -nonsense", Invocation::Help),
        ("-version", Invocation::Version),
        ("--version", Invocation::Version),
        ("-machine help", Invocation::ListMachines),
        ("-M ?", Invocation::ListMachines),
        ("-accel help", Invocation::ListAccelerators),
        ("-cpu help", Invocation::ListCpus),
        ("-nodefaults -display none -M q35 -device help", Invocation::ListDevices),
        ("-drive format=help", Invocation::ListImageFormats),
        ("-chardev help", Invocation::ListChardevs),
    ] {
        let answer = invocation(line);
        assert_eq!(answer, expected, "{line}");
        let prints = answer.text().is_some_and(|text| text.ends_with('\n'));
        assert_eq!(prints, answer != Invocation::Doctor, "{line}");
    }
}

#[test]
fn a_host_gives_a_machine_its_groups_its_ids_and_its_sockets() {
    use crate::hosting::cgroup::{Group, Knob, Limit};
    let line = "-kernel k --metrics unix:/run/m --log-format json -sandbox on,spawn=deny,uid-base=1879048192 \
                -cgroup parent=tenants/a,vcpu.cpu.max=150000/100000,all.io.max=8:0/rbps=1000";
    let machine = machine(line);
    assert_eq!(machine.metrics, Some(PathBuf::from("/run/m")));
    assert_eq!(
        (machine.log_format, machine.uid_base),
        (Format::Json, Some(0x7000_0000))
    );
    let groups = machine.cgroup.unwrap();
    assert_eq!(groups.parent, Some(PathBuf::from("tenants/a")));
    let limit = |group, knob, value: &str| Limit {
        group,
        knob,
        value: value.into(),
    };
    assert_eq!(
        groups.limits,
        [
            limit(Some(Group::Helper(ipc::Role::Vcpu)), Knob::CpuMax, "150000/100000"),
            limit(None, Knob::IoMax, "8:0/rbps=1000"),
        ]
    );
    let default = |line: &str| super::machine(line).cgroup.unwrap().parent;
    assert_eq!(default("-kernel k -cgroup on"), Some(PathBuf::from("bulkhead")));
    assert_eq!(default("-kernel k -cgroup parent=self"), None);
}
