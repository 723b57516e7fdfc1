//! Rows about the monitor: round trips, throughput, and what a busy client costs another one.

use super::PAIRS_OF_LOAD;
use super::peers::Peer;
use super::report::{Report, Values};
use bulkhead_tests::load::{Busy, Load, RawClient, percentile, request};
use serde_json::json;
use std::time::{Duration, Instant};

/// Commands that are asked on an ordinary machine.
const COMMANDS: [&str; 4] = ["query-status", "query-cpus-fast", "query-version", "query-block"];
/// Round trips in one run of one command.
const ROUND_TRIPS: usize = 3_000;
/// Requests in one run of throughput.
const STREAMED: usize = 4_000;
/// Nodes of a graph that is asked for as a whole, and how often.
const NODES: usize = 1000;
const NODE_ROUND_TRIPS: usize = 50;
/// How long the other client is asked while one keeps the server busy.
const BUSY: Duration = Duration::from_secs(2);

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// The rows of a command.
fn names(command: &str) -> [String; 3] {
    [
        format!("{command}, round trip, median (µs)"),
        format!("{command}, round trip, 99 % below (µs)"),
        format!("{command}, sent without waiting (per second)"),
    ]
}

fn measure(peer: Peer, wanted: &[&str]) -> std::io::Result<Values> {
    let mut values = Values::new();
    let mut machine = peer.start(&["admin", "client"]);
    let mut client = RawClient::connect(&machine.socket("client"))?;
    let commands = machine.commands();
    for (order, command) in wanted.iter().enumerate() {
        if !commands.iter().any(|name| name == command) {
            continue;
        }
        let line = request(command);
        client.time(&line, ROUND_TRIPS / 10)?;
        let mut times = client.time(&line, ROUND_TRIPS)?;
        let (median, slow) = (percentile(&mut times, 0.5), percentile(&mut times, 0.99));
        let taken = client.stream(&line, STREAMED)?;
        let measured = [micros(median), micros(slow), STREAMED as f64 / taken.as_secs_f64()];
        for (name, value) in names(command).into_iter().zip(measured) {
            values.insert((order, name), vec![value]);
        }
    }
    drop(client);
    machine.end();
    Ok(values)
}

/// The slowest percent of another client's round trips while one client keeps the server busy. The other client uses a
/// second monitor, because QEMU serves one client on each.
fn measure_beside(peer: Peer, load: Load, queries: &[Vec<u8>]) -> std::io::Result<f64> {
    let machine = peer.start(&["admin", "busy", "client"]);
    let mut client = RawClient::connect(&machine.socket("client"))?;
    let busy = Busy::start(load, &machine.socket("busy"));
    // One message of 63 MiB takes QEMU longer than a row should: it need not be through with it.
    let started = Instant::now();
    while busy.rounds() == 0 && started.elapsed() < BUSY {
        std::thread::sleep(Duration::from_millis(1));
    }
    let slowest = slowest_percent(&mut client, queries)?;
    machine.kill();
    // It cannot have ended otherwise than with its server.
    drop(busy.stop());
    Ok(slowest)
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

/// Measures all rows.
pub fn rows(report: &mut Report) {
    let wanted = COMMANDS.map(|command| report.wants_any(&names(command)).then_some(command));
    let wanted: Vec<_> = wanted.into_iter().flatten().collect();
    if !wanted.is_empty() {
        let runs = report.pairs(PAIRS_OF_LOAD, |peer| measure(peer, &wanted).expect("measuring"));
        report.rows(runs);
    }
    many_nodes(report);
    for (load, what) in [
        (Load::Dumps, "dumps 256 MiB into a pipe"),
        (Load::Descriptors, "passes descriptors"),
        (Load::Garbage, "sends messages of 63 MiB"),
    ] {
        let name = format!("any query while another client {what}, 99 % below (ms)");
        if report.wants(&name) {
            let queries = queries();
            let (ours, theirs) = report.pairs(PAIRS_OF_LOAD, |peer| {
                measure_beside(peer, load, &queries).expect("measuring")
            });
            report.row(&name, &ours, &theirs);
        }
    }
}

/// How long it takes to ask about very many nodes.
fn many_nodes(report: &mut Report) {
    let name = format!("query-named-block-nodes of {NODES} nodes, round trip, median (ms)");
    if !report.wants(&name) {
        return;
    }
    let (ours, theirs) = report.pairs(PAIRS_OF_LOAD, |peer| {
        let folder = tempfile::tempdir().expect("scratch directory");
        let mut machine = peer.start_bare(folder.path(), &["admin", "client"]);
        for number in 0..NODES {
            let node = json!({"driver": "null-co", "node-name": format!("node-{number}"), "size": 1 << 20});
            machine.qmp.execute("blockdev-add", node);
        }
        let mut client = RawClient::connect(&machine.socket("client")).expect("a client");
        let times = client.time(&request("query-named-block-nodes"), NODE_ROUND_TRIPS);
        machine.end();
        micros(percentile(&mut times.expect("asking"), 0.5)) / 1e3
    });
    report.row(&name, &ours, &theirs);
}
