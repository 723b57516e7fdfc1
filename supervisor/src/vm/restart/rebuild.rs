//! The next block-proc becomes what the last one was, as the supervisor knew it: the turn of the graph is the caller's.

use super::super::{Vm, bitmaps, graph, resize, throttling};
use crate::graph::export::ExportUse;
use crate::helper::{Block, Helper, HelperError, STORAGE_DEADLINE};
use crate::logging;
use ipc::block::{BlockReply, BlockRequest};
use ipc::graph::{GraphReply, GraphRequest, NodeId};
use ipc::nbd::ExportSpec;
use ipc::qmp::Event;
use ipc::vcpu::VcpuRequest;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Creates everything. The disks are paused afterwards.
///
/// # Errors
/// What is not as it was: the next block-proc cannot take the last one's place.
pub async fn all(vm: &Rc<Vm>) -> Result<(), String> {
    let block = vm.block.get().ok_or("there is no block-proc")?;
    ask(&block, BlockRequest::Pause)
        .await
        .map_err(|error| error.to_string())?;
    let rebuild = Rebuild { vm, block };
    rebuild.groups().await?;
    rebuild.nodes().await?;
    rebuild.bitmaps().await?;
    rebuild.disks().await?;
    rebuild.rngs().await?;
    rebuild.exports().await;
    rebuild.drivers().await
}

async fn ask(block: &Helper<Block>, request: BlockRequest) -> Result<BlockReply, HelperError> {
    block.ask_within(STORAGE_DEADLINE, request).await
}

struct Rebuild<'a> {
    vm: &'a Rc<Vm>,
    block: Rc<Helper<Block>>,
}

impl Rebuild<'_> {
    async fn ask_graph(&self, request: GraphRequest) -> Result<GraphReply, String> {
        match ask(&self.block, BlockRequest::Graph(request)).await {
            Ok(BlockReply::Graph(reply)) => Ok(reply),
            Ok(_) => Err("block-proc answered with something else".to_owned()),
            Err(error) => Err(logging::printable(error.to_string().as_bytes()).to_string()),
        }
    }

    async fn groups(&self) -> Result<(), String> {
        for (group, limits) in throttling::known(self.vm) {
            self.ask_graph(GraphRequest::SetGroup { group, limits }).await?;
        }
        Ok(())
    }

    /// Children come first.
    async fn nodes(&self) -> Result<(), String> {
        let mut order: Vec<NodeId> = Vec::new();
        {
            let graph = self.vm.graph.borrow();
            for node in graph.nodes.keys().flat_map(|id| graph.tree(*id)) {
                if !order.contains(&node) {
                    order.push(node);
                }
            }
        }
        for id in order {
            let node = self.vm.graph.borrow().node_or_missing(id).clone();
            let failed = |error: &dyn std::fmt::Display| format!("node {}: {error}", node.name);
            let same = node.children.values().map(|child| (*child, *child)).collect();
            let spec = graph::spec_again(self.vm, &node, &same)
                .await
                .map_err(|error| failed(&error.line()))?;
            let add = GraphRequest::Add {
                node: id,
                thread: node.thread,
                spec,
            };
            match self.ask_graph(add).await.map_err(|error| failed(&error))? {
                GraphReply::Added(report) => graph::set_report(self.vm, id, report),
                _ => return Err(failed(&"its image is another one by now")),
            }
            if let Some(request) = graph::detect_zeroes_request(id, node.settings) {
                self.ask_graph(request).await.map_err(|error| failed(&error))?;
            }
            let bytes = node.report.write_threshold;
            if bytes != 0 {
                let request = GraphRequest::SetWriteThreshold { node: id, bytes };
                self.ask_graph(request).await.map_err(|error| failed(&error))?;
            }
        }
        Ok(())
    }

    /// What images keep comes from there, as far as they are up to date. What was in memory is lost, and says so.
    async fn bitmaps(&self) -> Result<(), String> {
        let all: Vec<_> = self.vm.graph.borrow().bitmaps.values().cloned().collect();
        for bitmap in all {
            let lost = !bitmap.persistent;
            let request = bitmaps::place_request(&bitmap, lost);
            self.ask_graph(request)
                .await
                .map_err(|error| format!("bitmap {}: {error}", bitmap.name))?;
        }
        if self.vm.graph.borrow().bitmaps.is_empty() {
            return Ok(());
        }
        if let GraphReply::Bitmaps(reports) = self.ask_graph(GraphRequest::ReportBitmaps).await? {
            bitmaps::take_reports(self.vm, reports);
        }
        Ok(())
    }

    async fn disks(&self) -> Result<(), String> {
        let backends = self.vm.graph.borrow().backends.clone();
        let mut changed = BTreeMap::new();
        for backend in backends {
            let (Some(device), Some(node)) = (backend.device, backend.root) else {
                continue;
            };
            let name = self.vm.device_name(device);
            let failed = |error: String| format!("{name}: {error}");
            let options = graph::device_options(self.vm, device, &backend);
            let request = GraphRequest::Attach { device, node, options };
            let GraphReply::Attached(identity) = self.ask_graph(request).await.map_err(failed)? else {
                return Err(failed("block-proc answered with something else".to_owned()));
            };
            // A resize that the last block-proc did not live to tell of is told now.
            if self.vm.block.shown.borrow().get(&device) != Some(&identity) {
                changed.insert(device, identity);
            }
            let group = backend.throttle_group.as_deref();
            if let Some(group) = group.and_then(|group| throttling::known_number(self.vm, group)) {
                let group = Some(group);
                let request = GraphRequest::ThrottleDevice { device, group };
                self.ask_graph(request).await.map_err(failed)?;
            }
        }
        resize::announce(self.vm, changed).await;
        Ok(())
    }

    async fn rngs(&self) -> Result<(), String> {
        let sources: Vec<_> = {
            let sources = self.vm.block.rng_sources.borrow();
            let clone = sources
                .iter()
                .map(|(device, (source, limit))| Ok((*device, source.try_clone()?, *limit)));
            clone
                .collect::<std::io::Result<_>>()
                .map_err(|error| error.to_string())?
        };
        for (device, source, limit) in sources {
            let request = BlockRequest::AttachRng { device, source, limit };
            ask(&self.block, request)
                .await
                .map_err(|error| format!("{}: {error}", self.vm.device_name(device)))?;
        }
        Ok(())
    }

    /// Clients have to connect again. An export that cannot be had again is gone, which its event says.
    async fn exports(&self) {
        let exports: Vec<ExportUse> = self.vm.graph.borrow().exports.clone();
        for export in exports {
            let spec = ExportSpec {
                node: export.node,
                ..export.spec.clone()
            };
            let added = match export.shutting_down {
                true => Err("it was being removed".to_owned()),
                false => self.ask_graph(GraphRequest::AddExport(spec)).await,
            };
            if let Err(error) = added {
                logging::line(format_args!("export {}: {error}", export.id));
                super::super::exports::forget(self.vm, export.number);
                self.vm.emit(Event::BlockExportDeleted { id: export.id });
            }
        }
    }

    /// The drivers that were served are again, from where the record says.
    async fn drivers(&self) -> Result<(), String> {
        for (device, (number, activation)) in self.vm.block.active() {
            let request = BlockRequest::Activate {
                device,
                number,
                activation,
            };
            match ask(&self.block, request).await {
                Ok(_) => {}
                // Its rings were broken already, or are now: the driver has to reset the device.
                Err(HelperError::Failed(failure)) => {
                    logging::line(format_args!(
                        "{}: its queues cannot be taken up: {}",
                        self.vm.device_name(device),
                        logging::printable(failure.message.as_bytes())
                    ));
                    if let Ok(vcpu) = self.vm.vcpu() {
                        let _ = vcpu.ask(VcpuRequest::DeviceBroken { device }).await;
                    }
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }
}
