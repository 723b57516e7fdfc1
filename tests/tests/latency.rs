//! What one client asks for delays no other client.

use bulkhead_tests::load::{Busy, Load, RawClient, percentile, request};
use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// What 99 of 100 queries take at most, on a machine that has nothing else to do.
const LIMIT: Duration = Duration::from_millis(10);
/// How long each load is measured.
const MEASURED: Duration = Duration::from_secs(5);

fn machine() -> (Machine, Qmp) {
    let mut machine = Machine::start(&format!("-m 256 -smp 2 -S -kernel {}", guest::image().display()));
    let qmp = machine.qmp();
    (machine, qmp)
}

fn queries(qmp: &mut Qmp) -> Vec<String> {
    let commands = qmp.run("query-commands");
    let names = commands
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["name"].as_str().unwrap().to_owned());
    names.filter(|name| name.starts_with("query-")).collect()
}

/// Not a matter of time: the others are in the middle of what they do, and stay there.
#[test]
fn queries_are_answered_while_others_are_in_the_middle_of_something() {
    need_kvm!();
    let (machine, mut qmp) = machine();
    let queries = queries(&mut qmp);
    // A dump, awaited by its client, into a pipe that nobody reads.
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut dumping = Qmp::connect(&machine.path("qmp")).unwrap();
    dumping.pass(&[writer.as_fd()]);
    dumping.execute("getfd", json!({"fdname": "pipe"}));
    drop(writer);
    let arguments = json!({"paging": false, "protocol": "fd:pipe"});
    dumping
        .send(&json!({"execute": "dump-guest-memory", "arguments": arguments}))
        .unwrap();
    let mut first = [0];
    reader.read_exact(&mut first).unwrap();
    // A message of 30 MiB without its end.
    let mut talking = UnixStream::connect(machine.path("qmp")).unwrap();
    talking.write_all(b"{\"execute\": \"").unwrap();
    talking.write_all(&vec![b'x'; 30 << 20]).unwrap();
    for round in 0..20 {
        for query in &queries {
            assert!(!qmp.query(query).is_null(), "{query} in round {round}");
        }
    }
    assert_eq!(qmp.run("query-dump")["status"], json!("active"));
    talking.write_all(b"\"}\n").unwrap();
    let rest = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()).unwrap());
    let completed: Value = qmp.wait_event("DUMP_COMPLETED");
    assert_eq!(completed["result"]["status"], json!("completed"));
    assert!(rest.join().unwrap() > 256 << 20);
}

#[test]
#[ignore = "measures time: make soak, on a quiet machine"]
fn ninety_nine_of_a_hundred_queries_take_ten_milliseconds_at_most_whatever_another_client_does() {
    need_kvm!();
    println!("| another client | queries | median (ms) | 99 % below (ms) | longest (ms) | its rounds |");
    println!("|---|---|---|---|---|---|");
    for load in [Load::Dumps, Load::Descriptors, Load::Garbage] {
        let (machine, mut qmp) = machine();
        let requests: Vec<_> = queries(&mut qmp).iter().map(|query| request(query)).collect();
        let mut client = RawClient::connect(&machine.path("qmp")).unwrap();
        drop(qmp);
        let busy = Busy::start(load, &machine.path("qmp"));
        let begun = Instant::now();
        let mut times = Vec::new();
        while begun.elapsed() < MEASURED || busy.rounds() == 0 {
            for request in &requests {
                let asked = Instant::now();
                client.round_trip(request).unwrap();
                times.push(asked.elapsed());
            }
        }
        let rounds = busy.stop().unwrap();
        let [median, most, longest] = [0.5, 0.99, 1.0].map(|share| percentile(&mut times, share).as_secs_f64() * 1e3);
        println!(
            "| {load:?} | {} | {median:.2} | {most:.2} | {longest:.2} | {rounds} |",
            times.len()
        );
        assert!(percentile(&mut times, 0.99) < LIMIT, "{load:?}");
    }
}
