//! `qemu-io` of the human monitor: an operator's own reads and writes on a node, for tests and for repair. As with QEMU, what
//! it finds out is printed on standard output, and the reply is empty.

use super::{Vm, block_info, graph};
use crate::graph::error::GraphError;
use crate::logging;
use ipc::graph::{Breakpoint, GraphReply, GraphRequest, ManualIo, NodeId};
use ipc::human::{HumanReply, IoCommand};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

/// Most commands that are not waited for.
const MAX_BACKGROUND: usize = 64;
/// How long a command may take that may be held at a breakpoint: nobody says when it goes on. A block-proc that does not
/// answer is found out by what it is asked otherwise.
const HELD_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// Carries a command out. With `is_qdev` the target is a device's id or path, otherwise a drive's id or a node's name.
pub async fn carry_out(vm: &Rc<Vm>, target: &str, is_qdev: bool, command: IoCommand) -> HumanReply {
    match try_carry_out(vm, target, is_qdev, command).await {
        Ok(()) => HumanReply::Done,
        Err(problem) => HumanReply::Refused(problem),
    }
}

async fn try_carry_out(vm: &Rc<Vm>, target: &str, is_qdev: bool, command: IoCommand) -> Result<(), String> {
    let node = find(vm, target, is_qdev).map_err(|error| error.to_string())?;
    match command {
        IoCommand::Io {
            io,
            quiet,
            background: false,
        } => {
            run(vm, node, io, quiet).await;
            Ok(())
        }
        IoCommand::Io { io, quiet, .. } => {
            if vm.manual_io.get() >= MAX_BACKGROUND {
                return Err(format!(
                    "{MAX_BACKGROUND} commands are under way: aio_flush waits for them"
                ));
            }
            vm.manual_io.set(vm.manual_io.get() + 1);
            let task = Rc::clone(vm);
            vm.executor.spawn(async move {
                run(&task, node, io, quiet).await;
                task.manual_io.set(task.manual_io.get() - 1);
            });
            Ok(())
        }
        IoCommand::WaitForAll => {
            poll_fn(|_| match vm.manual_io.get() {
                0 => Poll::Ready(()),
                _ => Poll::Pending,
            })
            .await;
            Ok(())
        }
        IoCommand::Breakpoint(action) => {
            let failed = match &action {
                Breakpoint::Set { .. } => "Could not set a breakpoint".to_owned(),
                Breakpoint::Resume { .. } => "Could not resume request".to_owned(),
                Breakpoint::Remove { tag } => format!("Could not remove breakpoint {tag}"),
                Breakpoint::Wait { tag } => format!("Could not wait for breakpoint {tag}"),
            };
            let asked = graph::ask_within(vm, HELD_DEADLINE, GraphRequest::Breakpoint { node, action });
            if let Err(error) = asked.await {
                logging::print(&format!("{failed}: {error}\n"));
            }
            Ok(())
        }
        IoCommand::Length => {
            let GraphReply::Reports(reports) = graph::ask(vm, GraphRequest::Report(vec![node]))
                .await
                .map_err(|error| error.to_string())?
            else {
                return Ok(());
            };
            if let Some(report) = reports.get(&node) {
                logging::print(&format!("{}\n", size(report.bytes)));
            }
            Ok(())
        }
    }
}

fn find(vm: &Vm, target: &str, is_qdev: bool) -> Result<NodeId, GraphError> {
    let description = vm.graph.borrow();
    if !is_qdev {
        return description.lookup_any(target).map(|node| node.id);
    }
    let path = target.strip_suffix("/virtio-backend").unwrap_or(target);
    let is_target = |found: &str| found == path || found.strip_prefix("/machine/peripheral/") == Some(path);
    let backend = description
        .backends
        .iter()
        .find(|backend| {
            let device = block_info::qdev_of(vm, backend);
            device.is_some_and(|found| is_target(found.trim_end_matches("/virtio-backend")))
        })
        .ok_or_else(|| GraphError::NoDevice(target.to_owned()))?;
    backend.root.ok_or_else(|| GraphError::NoMedium(target.to_owned()))
}

async fn run(vm: &Vm, node: NodeId, io: ManualIo, quiet: bool) {
    let begun = Instant::now();
    let request = GraphRequest::Io { node, io: io.clone() };
    let result = graph::ask_within(vm, HELD_DEADLINE, request).await;
    let (verb, past, offset, bytes) = match io {
        ManualIo::Read { offset, bytes, .. } => ("read", "read", offset, bytes),
        ManualIo::Write { offset, bytes, .. } | ManualIo::Zero { offset, bytes, .. } => {
            ("write", "wrote", offset, bytes)
        }
        ManualIo::Discard { offset, bytes } => ("discard", "discard", offset, bytes),
        ManualIo::Flush => ("flush", "flush", 0, 0),
    };
    match result {
        Ok(GraphReply::Mismatch(at)) => logging::print(&format!(
            "Pattern verification failed at offset {at}, {} bytes\n",
            (offset + bytes).saturating_sub(at)
        )),
        Ok(_) if quiet => {}
        Ok(_) => logging::print(&report(past, offset, bytes, begun.elapsed())),
        Err(error) => logging::print(&format!("{verb} failed: {error}\n")),
    }
}

/// Two lines, as the tool of this name writes them.
fn report(past: &str, offset: u64, bytes: u64, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(1e-9);
    let rate = size((bytes as f64 / seconds) as u64);
    format!(
        "{past} {bytes}/{bytes} bytes at offset {offset}\n{}, 1 ops; {:02}:{:02}:{:05.2} ({rate}/sec and {:.4} ops/sec)\n",
        size(bytes),
        time.as_secs() / 3600,
        time.as_secs() / 60 % 60,
        seconds % 60.0,
        1.0 / seconds
    )
}

/// With the largest binary unit of which there is at least one.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let Some(unit) = bytes.max(1).ilog2().checked_div(10).filter(|unit| *unit > 0) else {
        return format!("{bytes} bytes");
    };
    let scale = 1_u64 << (10 * unit);
    let name = UNITS[unit as usize - 1];
    if bytes.is_multiple_of(scale) {
        format!("{} {name}", bytes / scale)
    } else {
        format!("{:.3} {name}", bytes as f64 / scale as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_unit_that_fits() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (512, "512 bytes"),
            (1024, "1 KiB"),
            (65536, "64 KiB"),
            (1536, "1.500 KiB"),
            (128 << 20, "128 MiB"),
            (u64::MAX, "16.000 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn a_report_is_what_programs_take_apart() {
        assert_eq!(
            report("wrote", 512, 65536, Duration::from_millis(500)),
            "wrote 65536/65536 bytes at offset 512\n64 KiB, 1 ops; 00:00:00.50 (128 KiB/sec and 2.0000 ops/sec)\n"
        );
    }
}
