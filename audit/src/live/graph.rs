//! Who holds what, as a picture: Graphviz's language, and SVG that needs no other program.

use super::descriptors::kind;
use super::find::{Machine, Member};
use super::sockets::inode;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// An edge: a process holds an object, or is connected with another process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Edge {
    /// Place of the process in the machine.
    from: usize,
    /// What is held, or the place of the other process.
    to: End,
    /// `rw`, `ro`, … and how many.
    label: String,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Process(usize),
    Object(String),
}

/// Things that are no object of their own but one of many.
fn object_name(kind: &str, link: &str, object: &str, shared: &BTreeSet<&str>) -> String {
    match kind {
        "memfd:bulkhead-ram" => "guest RAM".into(),
        "file" | "block-device" | "directory" | "character-device" => std::path::Path::new(link)
            .file_name()
            .map_or_else(|| link.to_owned(), |name| name.to_string_lossy().into_owned()),
        "eventfd" if shared.contains(object) => "eventfds of queues".into(),
        "eventfd" => "own eventfds".into(),
        kind => kind.to_owned(),
    }
}

fn edges(machine: &Machine) -> Vec<Edge> {
    let held = |member: &'_ Member| member.seen.descriptors.clone().unwrap_or_default();
    let all: Vec<_> = machine.processes.iter().map(held).collect();
    // An eventfd that two processes hold is a queue's.
    let mut holders: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
    for (place, descriptors) in all.iter().enumerate() {
        for descriptor in descriptors.iter().filter(|of| of.kind == "eventfd") {
            holders.entry(&descriptor.object).or_default().insert(place);
        }
    }
    let shared: BTreeSet<&str> = holders
        .iter()
        .filter(|(_, of)| of.len() > 1)
        .map(|(object, _)| *object)
        .collect();
    let mut counts: BTreeMap<(usize, End, String), usize> = BTreeMap::new();
    for (place, descriptors) in all.iter().enumerate() {
        for descriptor in descriptors {
            let kind = kind(descriptor, &machine.sockets);
            let peer = machine.sockets.of(&descriptor.link).and_then(|socket| socket.peer);
            let other = peer.and_then(|peer| {
                all.iter()
                    .position(|theirs| theirs.iter().any(|of| inode(&of.link) == Some(peer)))
            });
            match other {
                // Once for both ends.
                Some(other) if other < place => {
                    let name = if descriptor.number == 0
                        || !machine.processes[place].role.is_some_and(|role| role.is_helper())
                    {
                        "channel"
                    } else {
                        "log"
                    };
                    counts.insert((place, End::Process(other), name.into()), 1);
                }
                Some(_) => {}
                None => {
                    // Each process's own wake-ups and empty ends are of no interest to others.
                    let name = object_name(kind, &descriptor.link, &descriptor.object, &shared);
                    if name != "null" {
                        *counts
                            .entry((place, End::Object(name), descriptor.rights.into()))
                            .or_default() += 1;
                    }
                }
            }
        }
        for mapping in machine.processes[place].seen.mappings.iter().flatten() {
            if mapping.name.starts_with("/memfd:bulkhead-ram") {
                let label = format!("mapped {}", mapping.rights.replace(['-', 's', 'p'], ""));
                counts.insert((place, End::Object("guest RAM".into()), label), 1);
            }
        }
    }
    counts
        .into_iter()
        .map(|((from, to, rights), count)| Edge {
            from,
            to,
            label: if count > 1 {
                format!("{rights} ×{count}")
            } else {
                rights
            },
        })
        .collect()
}

fn title(member: &Member) -> String {
    format!("{} {}", member.name(), member.seen.pid)
}

/// Graphviz's language.
pub fn dot(machine: &Machine) -> String {
    let mut out = String::from("digraph bulkhead {\n  rankdir=LR;\n  node [fontname=\"sans-serif\"];\n");
    for (place, member) in machine.processes.iter().enumerate() {
        let _ = writeln!(out, "  p{place} [shape=box, label=\"{}\"];", title(member));
    }
    let edges = edges(machine);
    let objects: BTreeSet<&String> = edges
        .iter()
        .filter_map(|edge| match &edge.to {
            End::Object(name) => Some(name),
            End::Process(_) => None,
        })
        .collect();
    let quoted = |name: &str| name.replace('\\', "\\\\").replace('"', "\\\"");
    for (place, name) in objects.iter().enumerate() {
        let _ = writeln!(out, "  o{place} [shape=ellipse, label=\"{}\"];", quoted(name));
    }
    for edge in &edges {
        let to = match &edge.to {
            End::Process(place) => format!("p{place}"),
            End::Object(name) => format!("o{}", objects.iter().position(|of| *of == name).unwrap_or(0)),
        };
        let arrows = if matches!(edge.to, End::Process(_)) {
            ", dir=both"
        } else {
            ""
        };
        let _ = writeln!(
            out,
            "  p{} -> {to} [label=\"{}\"{arrows}];",
            edge.from,
            quoted(&edge.label)
        );
    }
    out + "}\n"
}

const BOX: (usize, usize) = (190, 34);
const ROW: usize = 46;

/// A picture: processes on the left, what they hold on the right, channels as arcs on the left side.
pub fn svg(machine: &Machine) -> String {
    let edges = edges(machine);
    let objects: Vec<&String> = edges
        .iter()
        .filter_map(|edge| match &edge.to {
            End::Object(name) => Some(name),
            End::Process(_) => None,
        })
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let rows = machine.processes.len().max(objects.len());
    let (left, right, height) = (160, 760, rows * ROW + 60);
    // The shorter column is spread over the height of the longer one.
    let y_of = |place: usize, count: usize| 30 + (2 * place + 1) * rows * ROW / (2 * count.max(1));
    let process_y = |place| y_of(place, machine.processes.len());
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        right + BOX.0 + 30
    );
    for edge in &edges {
        let from = process_y(edge.from);
        match &edge.to {
            End::Process(other) if edge.label == "channel" => {
                let to = process_y(*other);
                let bend = left - 40 - (from - to).min(600) / 6;
                let _ = writeln!(
                    out,
                    "<path d=\"M{left} {from} C{bend} {from} {bend} {to} {left} {to}\" fill=\"none\" stroke=\"#36c\" stroke-width=\"1.5\"/>"
                );
            }
            End::Process(_) => {}
            End::Object(name) => {
                let to = y_of(objects.iter().position(|of| *of == name).unwrap_or(0), objects.len());
                let colour = if edge.label.contains('w') { "#c33" } else { "#393" };
                let start = left + BOX.0;
                let _ = writeln!(
                    out,
                    "<path d=\"M{start} {from} C{} {from} {} {to} {right} {to}\" fill=\"none\" stroke=\"{colour}\"/>\n\
                     <text x=\"{}\" y=\"{}\" fill=\"{colour}\" font-size=\"10\" text-anchor=\"end\">{}</text>",
                    start + 150,
                    right - 150,
                    right - 6,
                    to - 3,
                    escape(&format!("{} {}", machine.processes[edge.from].name(), edge.label)),
                );
            }
        }
    }
    let mut draw = |x: usize, y: usize, round: usize, text: &str| {
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{}\" width=\"{}\" height=\"{}\" rx=\"{round}\" fill=\"#f7f7f7\" stroke=\"#333\"/>\n\
             <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            y - BOX.1 / 2,
            BOX.0,
            BOX.1,
            x + BOX.0 / 2,
            y + 4,
            escape(text)
        );
    };
    for (place, member) in machine.processes.iter().enumerate() {
        draw(left, process_y(place), 3, &title(member));
    }
    for (place, name) in objects.iter().enumerate() {
        draw(right, y_of(place, objects.len()), 16, name);
    }
    let _ = writeln!(
        out,
        "<text x=\"20\" y=\"{}\">blue: channels (one packet, one message); red: may write; green: may only read</text>\n</svg>",
        height - 12
    );
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
