use super::*;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const LINE_STATUS: u64 = 5;
const DATA_READY: u8 = 1;
const INTERRUPT_ENABLE: u64 = 1;

struct Bench {
    port: Arc<Mutex<SerialPort>>,
    line: SerialLine,
    interrupt: EventFd,
    outbox: Outbox,
}

fn bench() -> Bench {
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let port = SerialPort::new(interrupt.try_clone().unwrap()).unwrap();
    let line = port.line();
    let (port, outbox) = (Arc::new(Mutex::new(port)), Outbox::new().unwrap());
    start_thread(Arc::clone(&port), outbox.clone()).unwrap();
    Bench {
        port,
        line,
        interrupt,
        outbox,
    }
}

fn fd(from: impl Into<OwnedFd>) -> Option<ChardevFd> {
    Some(ChardevFd::new(from.into()))
}

impl Bench {
    fn write(&self, bytes: &[u8]) {
        for byte in bytes {
            lock(&self.port).write(0x3f8, 0, &[*byte]);
        }
    }

    fn register(&self, offset: u64) -> u8 {
        let mut data = [0];
        lock(&self.port).read(0x3f8, offset, &mut data);
        data[0]
    }

    fn read_byte(&self) -> u8 {
        until(|| self.register(LINE_STATUS) & DATA_READY != 0);
        self.register(0)
    }
}

fn until(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "nothing happened");
        std::thread::yield_now();
    }
}

#[test]
fn bytes_travel_both_ways_and_raise_the_interrupt() {
    let bench = bench();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let input = theirs.try_clone().unwrap();
    bench.line.attach(fd(input), fd(theirs), false);
    bench.write(b"hello\n");
    let mut got = [0; 6];
    ours.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello\n");

    lock(&bench.port).write(0x3f8, INTERRUPT_ENABLE, &[1]);
    // Far more than the FIFO holds: the rest waits in the socket, and nothing is lost.
    let sent: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
    ours.write_all(&sent).unwrap();
    let received: Vec<u8> = sent.iter().map(|_| bench.read_byte()).collect();
    assert_eq!(received, sent);
    assert!(bench.interrupt.read().is_ok());
}

#[test]
fn a_closed_peer_is_reported_once_and_another_can_be_attached() {
    let bench = bench();
    let (ours, theirs) = UnixStream::pair().unwrap();
    bench.line.attach(fd(theirs.try_clone().unwrap()), fd(theirs), false);
    drop(ours);
    let mut events = VecDeque::new();
    until(|| {
        events = bench.outbox.take();
        !events.is_empty()
    });
    assert!(matches!(events.make_contiguous(), [VcpuEvent::SerialClosed]));
    bench.write(b"lost");
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    bench.line.attach(None, fd(theirs), false);
    bench.write(b"kept");
    let mut got = [0; 4];
    ours.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"kept");
    assert!(bench.outbox.take().is_empty());
}

#[test]
fn a_peer_that_does_not_read_costs_bytes_not_time() {
    let bench = bench();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    bench.line.attach(None, fd(theirs), false);
    for _ in 0..3 * MAX_BUFFERED_BYTES / 4096 {
        bench.write(&[b'x'; 4096]);
    }
    assert!(lock(&bench.line.0.buffer).len() <= MAX_BUFFERED_BYTES);
    // It still works when the peer reads again.
    let mut got = vec![0; MAX_BUFFERED_BYTES];
    ours.read_exact(&mut got).unwrap();
}

#[test]
fn the_end_of_an_input_pipe_leaves_the_output_open() {
    let bench = bench();
    let (input, _) = nix::unistd::pipe().unwrap();
    let (output, output_theirs) = nix::unistd::pipe().unwrap();
    bench.line.attach(fd(input), fd(output_theirs), false);
    until(|| lock(&bench.line.0.attachment).input.is_none());
    bench.write(b"still here");
    let mut got = [0; 10];
    let mut output = std::fs::File::from(output);
    output.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"still here");
    assert!(bench.outbox.take().is_empty());
}

#[test]
fn output_goes_to_a_file_and_to_a_terminal() {
    let bench = bench();
    let file = tempfile::tempfile().unwrap();
    bench.line.attach(None, fd(file.try_clone().unwrap()), false);
    bench.write(b"to the file");
    until(|| file.metadata().unwrap().len() == 11);

    let pty = nix::pty::openpty(None, None).unwrap();
    let mut mode = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
    nix::sys::termios::cfmakeraw(&mut mode);
    nix::sys::termios::tcsetattr(&pty.slave, nix::sys::termios::SetArg::TCSANOW, &mode).unwrap();
    bench
        .line
        .attach(fd(pty.master.try_clone().unwrap()), fd(pty.master), false);
    bench.write(b"to the terminal\n");
    let mut slave = std::fs::File::from(pty.slave);
    let mut got = [0; 16];
    slave.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"to the terminal\n");
    slave.write_all(b"k").unwrap();
    assert_eq!(bench.read_byte(), b'k');
}

#[test]
fn datagrams_are_taken_whole_and_nobody_listening_is_no_end() {
    let bench = bench();
    let here = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let peer_address = {
        let peer = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        peer.local_addr().unwrap()
    };
    here.connect(peer_address).unwrap();
    let address = here.local_addr().unwrap();
    bench.line.attach(fd(here.try_clone().unwrap()), fd(here), true);
    // Nobody is there: the kernel says so when the next datagram is sent.
    for _ in 0..3 {
        bench.write(b"lost");
        until(|| lock(&bench.line.0.buffer).is_empty());
    }
    let Ok(peer) = std::net::UdpSocket::bind(peer_address) else {
        println!("SKIPPED: the port was taken meanwhile");
        return;
    };
    peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    bench.write(b"hello");
    let mut got = Vec::new();
    while got != b"hello" {
        let mut datagram = [0; 100];
        let count = peer.recv(&mut datagram).unwrap();
        got.extend_from_slice(&datagram[..count]);
    }
    // An empty one is no end either, and a long one is not cut at what the FIFO has room for.
    peer.connect(address).unwrap();
    peer.send(b"").unwrap();
    let sent: Vec<u8> = (0..2000u32).map(|i| i as u8).collect();
    peer.send(&sent).unwrap();
    let received: Vec<u8> = sent.iter().map(|_| bench.read_byte()).collect();
    assert_eq!(received, sent);
    assert!(bench.outbox.take().is_empty());
}
