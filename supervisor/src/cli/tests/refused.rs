//! Lines that are refused, with the exact message.

use super::{parse, refusal};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

/// Each line alone is wrong whatever else is there.
#[test]
fn every_refusal_names_the_option_the_value_and_the_way_out() {
    let cases = [
        // Options.
        ("-kernle k", "-kernle: there is no such option; did you mean -kernel?"),
        ("--kernle k", "--kernle: there is no such option; did you mean -kernel?"),
        ("-frobnicate", "-frobnicate: there is no such option; --help lists them"),
        ("-kernel=k", "-kernel=k: a value is an argument of its own: -kernel k"),
        ("-kernel", "-kernel: the value is missing; it takes one: -kernel FILE"),
        (
            "-netdev user,id=n",
            "-netdev: Bulkhead has no such option: there are no network devices",
        ),
        (
            "-hda disk.img",
            "-hda: Bulkhead has no such option: disks are virtio disks: -drive file=FILE,if=virtio,format=raw",
        ),
        (
            "disk.img",
            "disk.img: not an option; a kernel is -kernel FILE, a disk is -drive file=FILE,if=virtio,format=raw",
        ),
        (
            "-",
            "-: not an option; a kernel is -kernel FILE, a disk is -drive file=FILE,if=virtio,format=raw",
        ),
        (
            "''",
            "'': not an option; a kernel is -kernel FILE, a disk is -drive file=FILE,if=virtio,format=raw",
        ),
        (
            "docter",
            "docter: not an option; did you mean 'bulkhead doctor', with nothing else?",
        ),
        (
            "-S doctor",
            "doctor: not an option; did you mean 'bulkhead doctor', with nothing else?",
        ),
        ("doctor -S", "doctor -S: doctor takes no arguments"),
        // Machine.
        ("-m 0", "-m 0: the machine needs at least 1 MiB of memory"),
        ("-m 1000k", "-m 1000k: the machine needs at least 1 MiB of memory"),
        ("-m 5T", "-m 5T: the machine can have at most 4 TiB of memory"),
        (
            "-m 99999999999999999999",
            "-m 99999999999999999999: the machine can have at most 4 TiB of memory",
        ),
        ("-m ''", "-m '': a value is missing"),
        (
            "-m -5",
            "-m -5: a size is a number of MiB or has a suffix K, M, G or T: 512, 512M, 2G",
        ),
        (
            "-m 1X",
            "-m 1X: a size is a number of MiB or has a suffix K, M, G or T: 512, 512M, 2G",
        ),
        ("-m sise=1G", "-m sise=1G: there is no key 'sise'; did you mean size?"),
        (
            "-m 1G,slots=2",
            "-m slots=2: memory cannot be added to a running machine: only slots=0 is possible",
        ),
        (
            "-m 1G,maxmem=2G",
            "-m maxmem=2G: memory cannot be added to a running machine: leave maxmem away or make it equal to size",
        ),
        ("-smp 300", "-smp 300: the count of vCPUs is a number from 1 to 255"),
        (
            "-smp 2,core=2",
            "-smp core=2: there is no key 'core'; did you mean cores?",
        ),
        (
            "-cpu qemu64,+avx2",
            "-cpu qemu64: there is no such CPU model: the guest gets the host's CPU, host (or its other name, max)",
        ),
        (
            "-cpu ''",
            "-cpu '': there is no such CPU model: the guest gets the host's CPU, host (or its other name, max)",
        ),
        ("-cpu host,avx2=maybe", "-cpu avx2=maybe: a CPU feature is on or off"),
        (
            "-cpu host,+",
            "-cpu +: a CPU feature is written +avx2, -avx2, avx2=on or avx2=off",
        ),
        (
            "-cpu host,+AVX2",
            "-cpu +AVX2: a CPU feature is written +avx2, -avx2, avx2=on or avx2=off",
        ),
        (
            "-cpu host,+avx2,avx2=off",
            "-cpu avx2=off: avx2 is switched both on and off",
        ),
        (
            "-cpu host,host-phys-bits=off",
            "-cpu host-phys-bits=off: host-phys-bits cannot be switched off",
        ),
        (
            "-machine pc",
            "-machine pc: there is no such machine; there are bulkhead, q35, none",
        ),
        (
            "-M nnone,accel=kvm:tcg",
            "-M nnone: there is no such machine; did you mean none?",
        ),
        (
            "-machine bulkead",
            "-machine bulkead: there is no such machine; did you mean bulkhead?",
        ),
        (
            "-machine accel=tcg",
            "-machine accel=tcg: Bulkhead needs KVM: write -accel kvm ('bulkhead doctor' says whether this host has it)",
        ),
        (
            "-machine usb=on",
            "-machine usb=on: the machine has no USB: only usb=off is possible",
        ),
        (
            "-machine vmport=on",
            "-machine vmport=on: the machine has no VMware port: only vmport=off|auto is possible",
        ),
        (
            "-accel tcg",
            "-accel tcg: Bulkhead needs KVM: write -accel kvm ('bulkhead doctor' says whether this host has it)",
        ),
        (
            "-accel kvn",
            "-accel kvn: there is no such accelerator: Bulkhead needs KVM, -accel kvm",
        ),
        (
            "-name gust=x",
            "-name gust=x: there is no key 'gust'; did you mean guest?",
        ),
        (
            "-name 'a\nb'",
            "-name a\\nb: a name cannot hold control characters: logs show it",
        ),
        (
            "-uuid 12",
            "-uuid 12: a UUID looks like 550e8400-e29b-41d4-a716-446655440000",
        ),
        ("-kernel ''", "-kernel '': the file name is empty"),
        // Disks.
        (
            "-drive disk.img",
            "-drive disk.img: there is no key 'disk.img'; the keys are file, if, format, id, readonly, \
             read-only, cache, cache.writeback, cache.direct, cache.no-flush, aio, discard, serial, num-queues, media, \
             copy-on-read, detect-zeroes, auto-read-only, rerror, werror",
        ),
        (
            "-drive if=virtio,format=raw",
            "-drive if=virtio,format=raw: file is missing: file=FILE names the image or block device",
        ),
        (
            "-drive file=a,format=raw",
            "-drive file=a,format=raw: if is missing: Bulkhead's disks are virtio disks, write if=virtio",
        ),
        (
            "-drive file=a,format=raw,if=ide",
            "-drive if=ide: Bulkhead's disks are virtio disks: if=virtio, or if=none with -device virtio-blk-pci,drive=ID",
        ),
        (
            "-drive file=a,if=virtio",
            "-drive file=a,if=virtio: format is missing: formats are not guessed from what a guest may have written, \
             write format=raw or format=qcow2",
        ),
        (
            "-drive file=a,if=virtio,format=vmdk",
            "-drive format=vmdk: the supported image formats are: raw, qcow2",
        ),
        (
            "-drive file=,if=virtio,format=raw",
            "-drive file=: the file name is empty",
        ),
        (
            "-drive file=ssh://h/d,if=virtio,format=raw",
            "-drive file=ssh://h/d: disks are local files, block devices and NBD exports; a file whose name has a colon is file=./NAME",
        ),
        (
            "-drive file=json:{,if=virtio,format=raw",
            "-drive file=json:{: this is no JSON object of a node's options: EOF while parsing an object at line 1 column 1",
        ),
        (
            "-drive file=a,if=virtio,format=raw,werror=often",
            "-drive werror=often: 'often' invalid write error action",
        ),
        (
            "-drive file=a,if=virtio,format=raw,rerror=enospc",
            "-drive rerror=enospc: 'enospc' invalid read error action",
        ),
        (
            "-drive driver=nope,if=none,id=d",
            "-drive driver=nope,if=none,id=d: Parameter 'driver' does not accept value 'nope'",
        ),
        (
            "-drive driver=null-co",
            "-drive driver=null-co: if is missing: Bulkhead's disks are virtio disks, write if=virtio",
        ),
        (
            "-blockdev null-co",
            "-blockdev null-co: 'node-name' must be specified for the root node",
        ),
        (
            "-blockdev null-co,node-name=1bad",
            "-blockdev null-co,node-name=1bad: Invalid node-name: '1bad'",
        ),
        (
            "-blockdev null-co,node-name=a -blockdev null-co,node-name=a",
            "-blockdev null-co,node-name=a: Duplicate nodes with node-name='a'",
        ),
        (
            "-blockdev null-co,node-name=d -drive file=a,if=none,format=raw,id=d",
            "-blockdev null-co,node-name=d: node-name=d is conflicting with a device id",
        ),
        (
            "-blockdev raw,node-name=a,foo=1,file=b",
            "-blockdev raw,node-name=a,foo=1,file=b: Parameter 'foo' is unexpected",
        ),
        (
            "-blockdev file,node-name=a,filename=x,aio=fast",
            "-blockdev file,node-name=a,filename=x,aio=fast: Parameter 'aio' does not accept value 'fast'",
        ),
        (
            "-drive file=json:{},if=virtio,format=raw",
            "-drive file=json:{},if=virtio,format=raw: Parameter 'file' is missing",
        ),
        (
            "-drive file=a,if=virtio,format=raw,cahce=none",
            "-drive cahce=none: there is no key 'cahce'; did you mean cache?",
        ),
        (
            "-drive file=a,if=virtio,format=raw,cache=fast",
            "-drive cache=fast: cache is writeback, none, writethrough, directsync or unsafe",
        ),
        (
            "-drive file=a,if=virtio,format=raw,aio=native",
            "-drive aio=native: native I/O goes past the host's page cache: add cache=none or cache.direct=on",
        ),
        (
            "-drive file=a,if=virtio,format=raw,aio=posix",
            "-drive aio=posix: aio is threads, io_uring or native",
        ),
        (
            "-drive file=a,if=virtio,format=raw,discard=yes",
            "-drive discard=yes: discard is unmap (or on), or ignore (or off)",
        ),
        (
            "-drive file=a,if=virtio,format=raw,readonly=1",
            "-drive readonly=1: this is a switch: on or off",
        ),
        (
            "-drive file=a,if=virtio,format=raw,serial=123456789012345678901",
            "-drive serial=123456789012345678901: a serial number has at most 20 bytes",
        ),
        (
            "-drive file=a,if=virtio,format=raw,num-queues=0",
            "-drive num-queues=0: the count of queues is a number from 1 to 32",
        ),
        (
            "-drive file=a,if=virtio,format=raw,media=cdrom",
            "-drive media=cdrom: Bulkhead has no CD-ROM drive: only media=disk is possible",
        ),
        (
            "-drive file=a,if=virtio,format=raw,id=0a",
            "-drive id=0a: an identifier begins with a letter and goes on with letters, digits, '-', '.' and '_'",
        ),
        (
            "-drive file=a,if=virtio,format=raw,id=x -drive file=b,if=virtio,format=raw,id=x",
            "-drive id=x: there is already a drive with the id x: give each its own",
        ),
        (
            "-drive file=a,if=virtio,format=raw,id=virtio1 -drive file=b,if=virtio,format=raw",
            "-drive file=b,if=virtio,format=raw: there is already a drive with the id virtio1: give each its own",
        ),
        (
            "-drive file=a,if=virtio,format=raw,aio=threads -drive file=b,if=virtio,format=raw,aio=io_uring",
            "-drive aio=io_uring: all disks share one I/O engine, and virtio0 has another",
        ),
        // Inherited files.
        (
            "-add-fd fd=5",
            "-add-fd fd=5: set is missing: -add-fd fd=N,set=M puts the inherited file descriptor N into the set M",
        ),
        (
            "-add-fd set=5",
            "-add-fd set=5: fd is missing: -add-fd fd=N,set=M puts the inherited file descriptor N into the set M",
        ),
        (
            "-add-fd fd=-1,set=1",
            "-add-fd fd=-1: a file descriptor is a number from 0 to 2147483647",
        ),
        (
            "-add-fd fd=2,set=1",
            "-add-fd fd=2: 0, 1 and 2 are the standard input, output and error",
        ),
        (
            "-add-fd fd=5,set=x",
            "-add-fd set=x: a set is a number from 0 to 9223372036854775807",
        ),
        (
            "-add-fd 5",
            "-add-fd 5: there is no key '5'; the keys are fd, set, opaque",
        ),
        // Character devices and monitors.
        (
            "-serial vc",
            "-serial vc: this can be stdio, file:FILE, pipe:PATH, unix:PATH or tcp:HOST:PORT, both with \
             [,server=on][,wait=off], udp:HOST:PORT, pty, null, none or chardev:ID",
        ),
        (
            "-serial udp:h",
            "-serial udp:h: a UDP address is HOST:PORT, and a port is a number up to 65535",
        ),
        (
            "-serial tcp:h:1,to=5",
            "-serial to=5: only a listening socket tries several ports",
        ),
        (
            "-serial tcp:h:9,server=on,to=5",
            "-serial to=5: the last port is a number from 9 to 65535",
        ),
        (
            "-serial tcp:h:9,ipv4=off,ipv6=off",
            "-serial tcp:h:9,ipv4=off,ipv6=off: ipv4 and ipv6 cannot both be off",
        ),
        (
            "-serial unix:/s,server=on,reconnect=5",
            "-serial reconnect=5: only a socket that connects to an address can do so again",
        ),
        (
            "-serial unix:/s,reconnect=5,reconnect-ms=5",
            "-serial unix:/s,reconnect=5,reconnect-ms=5: reconnect and reconnect-ms exclude each other",
        ),
        (
            "-chardev socket,id=m,path=/s,reconnect=1 -mon m,mode=control",
            "-mon m,mode=control: a monitor's connection that was closed stays closed: leave reconnect away",
        ),
        ("-serial tcp::1234", "-serial :1234: the host to connect to is missing"),
        (
            "-serial tcp:h:x",
            "-serial h:x: a TCP address is HOST:PORT, and a port is a number up to 65535",
        ),
        (
            "-serial mon:stdio",
            "-serial mon:stdio: there is no human monitor to share the terminal with: write stdio",
        ),
        (
            "-serial null -serial null",
            "-serial null: Bulkhead has one serial port, and an earlier -serial has taken it",
        ),
        ("-serial file:", "-serial file:: the file name is empty"),
        ("-serial unix:", "-serial unix:: a value is missing"),
        (
            "-serial unix:/s,sever=on",
            "-serial sever=on: there is no key 'sever'; did you mean server?",
        ),
        (
            "-serial unix:/s,wait=off",
            "-serial wait=off: only a listening socket can wait for its client: add server=on, or leave wait away",
        ),
        (
            "-qmp udp:localhost:4444",
            "-qmp udp:localhost:4444: a monitor needs a socket or stdio",
        ),
        (
            "-qmp file:/x -kernel k",
            "-qmp file:/x: a monitor needs a socket or stdio",
        ),
        (
            "-monitor stdio",
            "-monitor stdio: there is no human monitor (QMP is -qmp unix:PATH,server=on,wait=off): only none|null is possible",
        ),
        (
            "-chardev soket,id=c",
            "-chardev soket,id=c: there is no such character device; did you mean socket?",
        ),
        (
            "-chardev udp,id=c",
            "-chardev udp,id=c: port is missing: port=PORT says where the datagrams go",
        ),
        (
            "-chardev vc,id=c",
            "-chardev vc,id=c: there is no such character device; there are socket, udp, stdio, file, pipe, ringbuf, pty, \
             null",
        ),
        (
            "-chardev ringbuf,id=c,size=1000",
            "-chardev size=1000: size of ringbuf chardev must be power of two",
        ),
        (
            "-chardev socket,id=c,host=h",
            "-chardev host=h: the port is missing: port=PORT",
        ),
        (
            "-chardev socket,id=c,port=1,path=/p",
            "-chardev port=1: a socket has one address: a path, host and port, or an fd",
        ),
        (
            "-chardev ringbuf,id=c -mon c,mode=control",
            "-mon c,mode=control: a monitor needs a socket or stdio",
        ),
        (
            "-chardev null",
            "-chardev null: id is missing: id=NAME, for -serial chardev:NAME or -mon NAME",
        ),
        (
            "-chardev null,id=c,path=/p",
            "-chardev path=/p: there is no key 'path'; the keys are backend, id",
        ),
        (
            "-chardev file,id=c",
            "-chardev file,id=c: path is missing: path=FILE says where the output goes",
        ),
        (
            "-chardev socket,id=c",
            "-chardev socket,id=c: path is missing: path=PATH (or fd=N) says which socket",
        ),
        (
            "-chardev socket,id=c,fd=1",
            "-chardev fd=1: an inherited file descriptor is a number from 3 to 2147483647",
        ),
        (
            "-chardev socket,id=c,fd=5,path=/p",
            "-chardev fd=5: a socket has either a path or an fd",
        ),
        (
            "-chardev socket,id=c,fd=5,server=on",
            "-chardev fd=5: an inherited socket cannot be waited for at start: add wait=off",
        ),
        (
            "-chardev null,id=c -chardev pty,id=c",
            "-chardev id=c: there is already a character device with this id: give each its own",
        ),
        (
            "-mon c",
            "-mon c: mode is missing: there is no human monitor, QMP is mode=control",
        ),
        (
            "-qmp unix:/q,allow=query-staus",
            "-qmp allow=query-staus: there is no command 'query-staus' (the name of a file has a slash: ./FILE)",
        ),
        (
            "-mon c,mode=control,allow=stop:",
            "-mon allow=stop:: there is no command '' (the name of a file has a slash: ./FILE)",
        ),
        (
            "-serial unix:/q,allow=stop",
            "-serial allow=stop: there is no key 'allow'; the keys are path, server, wait, reconnect, reconnect-ms",
        ),
        (
            "-mon c,mode=readline",
            "-mon mode=readline: there is no human monitor, QMP is mode=control",
        ),
        (
            "-mon mode=control",
            "-mon mode=control: chardev is missing: -mon chardev=ID,mode=control",
        ),
        (
            "-mon nosuch,mode=control",
            "-mon nosuch,mode=control: there is no -chardev with this id",
        ),
        (
            "-chardev stdio,id=charmon -mon charmom,mode=control",
            "-mon charmom,mode=control: there is no -chardev with this id; did you mean charmon?",
        ),
        (
            "-chardev pty,id=c -serial chardev:c -mon c,mode=control",
            "-mon c,mode=control: the device is already in use by -serial chardev:c",
        ),
        (
            "-serial stdio -qmp stdio",
            "-qmp stdio: standard input and output are already in use by -serial stdio",
        ),
        (
            "-nographic -qmp stdio",
            "-qmp stdio: standard input and output are already in use by -nographic (-serial none takes the serial port off)",
        ),
        (
            "-chardev stdio,id=c -mon c,mode=control -serial stdio",
            "-serial stdio: standard input and output are already in use by -chardev stdio,id=c",
        ),
        (
            "-qmp unix:/q,server=on -qmp unix:/q,server=on",
            "-qmp unix:/q,server=on: this socket is already in use by -qmp unix:/q,server=on",
        ),
        (
            "-daemonize -serial stdio",
            "-serial stdio: -daemonize leaves no standard input and output: use unix:PATH or file:FILE",
        ),
        (
            "-daemonize -nographic",
            "-nographic (-serial none takes the serial port off): -daemonize leaves no standard input and output: \
             use unix:PATH or file:FILE",
        ),
        // What is so anyway.
        (
            "-display gtk",
            "-display gtk: there is no display: only none is possible",
        ),
        ("-vga std", "-vga std: there is no graphics card: only none is possible"),
        (
            "-nic user",
            "-nic user: there are no network devices: only none is possible",
        ),
        (
            "-sandbox off",
            "-sandbox off: Bulkhead is always sandboxed: only on is possible",
        ),
        (
            "-sandbox on,spawn=maybe",
            "-sandbox spawn=maybe: all that is not needed is denied: only spawn=deny|allow is possible",
        ),
        (
            "-rtc base=localtime",
            "-rtc base=localtime: the machine's clock shows UTC: only base=utc is possible",
        ),
        (
            "-boot menu=on",
            "-boot menu=on: there is no boot menu: only menu=off is possible",
        ),
        (
            "-overcommit mem-lock=on",
            "-overcommit mem-lock=on: guest memory is not locked: only mem-lock=off is possible",
        ),
        (
            "-action reboot=never",
            "-action reboot=never: reboot is one of reset, shutdown",
        ),
        (
            "-action panic=reset",
            "-action panic=reset: panic is one of shutdown, pause, exit-failure, none",
        ),
        (
            "-action watchdog=bark",
            "-action watchdog=bark: watchdog is one of reset, shutdown, poweroff, pause, debug, none, inject-nmi",
        ),
        (
            "-action crash=pause",
            "-action crash=pause: there is no key 'crash'; the keys are reboot, shutdown, panic, watchdog, helper-loss",
        ),
        (
            "-dump-on-panic core",
            "-dump-on-panic core: write file:FILE: no client is there that could pass an fd",
        ),
        (
            "-dump-on-panic fd:core,format=elf",
            "-dump-on-panic fd:core: write file:FILE: no client is there that could pass an fd",
        ),
        (
            "-dump-on-panic format=elf",
            "-dump-on-panic format=elf: protocol is missing: write file:FILE",
        ),
        ("-dump-on-panic file:", "-dump-on-panic file:: the file name is empty"),
        (
            "-dump-on-panic file:core,format=win-dmp",
            "-dump-on-panic format=win-dmp: format is one of elf, kdump-zlib, kdump-raw-zlib, kdump-lzo, kdump-raw-lzo, \
             kdump-snappy, kdump-raw-snappy, kdump-zstd, kdump-raw-zstd",
        ),
        (
            "-dump-on-crash core",
            "-dump-on-crash core: write file:FILE: no client is there that could pass an fd",
        ),
        (
            "-action helper-loss=reset",
            "-action helper-loss=reset: helper-loss is one of pause, shutdown",
        ),
        (
            "--metrics tcp:1",
            "--metrics tcp:1: this is unix:PATH, a socket that is made there",
        ),
        (
            "--log-format xml",
            "--log-format xml: this is text, json, journal or journal:PATH",
        ),
        (
            "-sandbox on,uid-base=7",
            "-sandbox uid-base=7: this is the first of 64 user and group ids of the machine's own, a multiple of 64",
        ),
        (
            "-cgroup parent=../..",
            "-cgroup parent=../..: parent is a path below the root of the control groups, without '..'",
        ),
        (
            "-cgroup vcpu.cpu.maximum=1",
            "-cgroup vcpu.cpu.maximum=1: vcpu.cpu.maximum: there are cpu.max, cpu.weight, memory.max, memory.high, pids.max, io.max, io.weight",
        ),
        (
            "-cgroup cpu.max=1",
            "-cgroup cpu.max=1: cpu.max: the group is missing: supervisor, vcpu, block, dump, qmp or all, then a dot",
        ),
        (
            "--policy-mode off",
            "--policy-mode off: this is enforce, or log: for development, every call that a policy lacks goes on",
        ),
        (
            "--restart-budget often",
            "--restart-budget often: this is how many restarts there may be within how many seconds, as in 3/60",
        ),
        (
            "--restart-budget 3/0",
            "--restart-budget 3/0: this is how many restarts there may be within how many seconds, as in 3/60",
        ),
        (
            "-device virtio-net-pci",
            "-device virtio-net-pci: 'virtio-net-pci' is not a valid device model name (-device help lists them)",
        ),
        (
            "-device vmcoreinfo -device vmcoreinfo",
            "-device vmcoreinfo: at most one vmcoreinfo device is permitted",
        ),
        (
            "-device vmcoreinfo,addr=3",
            "-device vmcoreinfo,addr=3: Property 'vmcoreinfo.addr' not found",
        ),
        (
            "-device vmcoreinfo,id=1",
            "-device vmcoreinfo,id=1: Parameter 'id' expects an identifier",
        ),
        (
            "-device virtio-rng-pci,id=a -device vmcoreinfo,id=a",
            "-device vmcoreinfo,id=a: Duplicate device ID 'a'",
        ),
        (
            "-device vmcoreinfo,id=a -device virtio-rng-pci,id=a",
            "-device virtio-rng-pci,id=a: Duplicate device ID 'a'",
        ),
        // The machine as a whole.
        (
            "",
            "-kernel is missing: Bulkhead boots a kernel directly: -kernel vmlinuz [-initrd FILE] [-append TEXT] (see --help)",
        ),
        (
            "-m 1G -drive file=a,if=virtio,format=raw",
            "-kernel is missing: Bulkhead boots a kernel directly: -kernel vmlinuz [-initrd FILE] [-append TEXT] (see --help)",
        ),
    ];
    for (line, expected) in cases {
        assert_eq!(refusal(line), expected, "{line}");
    }
}

#[test]
fn text_that_is_not_utf8_is_refused_where_text_is_needed() {
    let cases: [(&str, &[u8], &str); 6] = [
        ("-append", b"a\xff", "-append a\u{fffd}: this is not UTF-8 text"),
        ("-name", b"a\xff", "-name a\u{fffd}: this is not UTF-8 text"),
        ("-cpu", b"host\xff", "-cpu host\u{fffd}: this is not UTF-8 text"),
        ("-append", b"a\0", "-append a\\u{0}: text cannot hold a NUL byte"),
        ("-kernel", b"a\0", "-kernel a\\u{0}: a file name cannot hold a NUL byte"),
        (
            "-drive",
            b"file=a,if=virtio,format=raw,serial=\xff",
            "-drive serial=\u{fffd}: this is not UTF-8 text",
        ),
    ];
    for (option, value, expected) in cases {
        let arguments = [OsString::from(option), OsString::from_vec(value.to_vec())];
        let error = parse(arguments.into_iter()).expect_err("refused").to_string();
        assert_eq!(error, expected);
    }
}

#[test]
fn a_socket_path_has_the_length_that_the_kernel_takes() {
    let longest = "p".repeat(107);
    super::machine(&format!("-kernel k -serial unix:{longest}"));
    let error = refusal(&format!("-kernel k -serial unix:p{longest}"));
    assert!(
        error.ends_with(": the path of a Unix socket has at most 107 bytes"),
        "{error}"
    );
}

#[test]
fn the_number_of_disks_is_limited() {
    let disks = |count| "-kernel k".to_owned() + &" -drive file=a,if=virtio,format=raw".repeat(count);
    assert_eq!(super::machine(&disks(24)).drives.len(), 24);
    assert_eq!(
        refusal(&disks(25)),
        "-drive file=a,if=virtio,format=raw: a machine has at most 24 disks"
    );
}
