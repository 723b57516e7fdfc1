//! Rows about the monitor: round trips, throughput, and what a busy client costs another one.

use super::Peer;
use super::table::{self, Values};
use bulkhead_tests::load::{Busy, Load, RawClient, percentile, request};
use std::time::{Duration, Instant};

/// Round trips in one run of one command.
const ROUND_TRIPS: usize = 3_000;
/// Requests in one run of throughput.
const STREAMED: usize = 4_000;
/// How long the other client is asked while one keeps the server busy.
const BUSY: Duration = Duration::from_secs(2);

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

fn measure(peer: Peer, values: &mut Values) -> std::io::Result<()> {
    let mut add = |order: usize, name: String, value: f64| values.entry((order, name)).or_default().push(value);
    let mut machine = peer.start(&["admin", "client"]);
    let mut client = RawClient::connect(&machine.socket("client"))?;
    let commands = machine.commands();
    for (order, command) in ["query-status", "query-cpus-fast", "query-version", "query-block"]
        .iter()
        .enumerate()
    {
        if !commands.iter().any(|name| name == command) {
            continue;
        }
        let line = request(command);
        client.time(&line, ROUND_TRIPS / 10)?;
        let mut times = client.time(&line, ROUND_TRIPS)?;
        add(
            order,
            format!("{command}, round trip, median (µs)"),
            micros(percentile(&mut times, 0.5)),
        );
        add(
            order,
            format!("{command}, round trip, 99 % below (µs)"),
            micros(percentile(&mut times, 0.99)),
        );
        let taken = client.stream(&line, STREAMED)?;
        add(
            order,
            format!("{command}, sent without waiting (per second)"),
            STREAMED as f64 / taken.as_secs_f64(),
        );
    }
    drop(client);
    machine.end();
    Ok(())
}

/// The slowest percent of another client's round trips while one client keeps the server busy. The other client uses a
/// second monitor, because QEMU serves one client on each.
fn measure_beside(peer: Peer, load: Load, queries: &[Vec<u8>], values: &mut Vec<f64>) -> std::io::Result<()> {
    let machine = peer.start(&["admin", "busy", "client"]);
    let mut client = RawClient::connect(&machine.socket("client"))?;
    let busy = Busy::start(load, &machine.socket("busy"));
    // One message of 63 MiB takes QEMU longer than a row should: it need not be through with it.
    let started = Instant::now();
    while busy.rounds() == 0 && started.elapsed() < BUSY {
        std::thread::sleep(Duration::from_millis(1));
    }
    values.push(slowest_percent(&mut client, queries)?);
    machine.kill();
    // It cannot have ended otherwise than with its server.
    drop(busy.stop());
    Ok(())
}

/// What 99 % of a client's round trips take less than, ms. It asks for two seconds.
pub fn slowest_percent(client: &mut RawClient, queries: &[Vec<u8>]) -> std::io::Result<f64> {
    let begun = Instant::now();
    let mut times = Vec::new();
    while begun.elapsed() < BUSY {
        for query in queries {
            let asked = Instant::now();
            client.round_trip(query)?;
            times.push(asked.elapsed());
        }
    }
    Ok(percentile(&mut times, 0.99).as_secs_f64() * 1e3)
}

/// Every query that Bulkhead has; QEMU has them all.
pub fn queries() -> Vec<Vec<u8>> {
    let mut machine = Peer::Bulkhead.start(&["admin"]);
    let commands = machine.commands();
    machine.end();
    commands
        .iter()
        .filter(|name| name.starts_with("query-"))
        .map(|name| request(name))
        .collect()
}

/// Prints all rows.
pub fn rows(with_qemu: bool) {
    let (mut ours, mut theirs) = (Values::new(), Values::new());
    for pair in 0..=super::PAIRS_OF_LOAD {
        let (mut our, mut their) = (Values::new(), Values::new());
        measure(Peer::Bulkhead, &mut our).expect("measuring Bulkhead");
        if with_qemu {
            measure(Peer::Qemu, &mut their).expect("measuring QEMU");
        }
        if pair > 0 {
            table::add(&mut ours, our);
            table::add(&mut theirs, their);
        }
    }
    table::rows(&ours, &theirs);
    let queries = queries();
    for (load, what) in [
        (Load::Dumps, "dumps 256 MiB into a pipe"),
        (Load::Descriptors, "passes descriptors"),
        (Load::Garbage, "sends messages of 63 MiB"),
    ] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..super::PAIRS_OF_LOAD {
            measure_beside(Peer::Bulkhead, load, &queries, &mut ours).expect("measuring Bulkhead");
            if with_qemu {
                measure_beside(Peer::Qemu, load, &queries, &mut theirs).expect("measuring QEMU");
            }
        }
        table::row(
            &format!("any query while another client {what}, 99 % below (ms)"),
            &ours,
            &theirs,
        );
    }
}
