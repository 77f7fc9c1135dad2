/*
 * blkdata.h: the data path of blkback.c: requests from the rings of its devices, and three ways to their pages.
 *
 * A slot is copied before it is looked at, and everything in the copy is checked; whatever is wrong costs the request.
 */
#ifndef BLKDATA_H
#define BLKDATA_H

#include <inttypes.h>
#include <signal.h>
#include <sys/mman.h>
#include <xenevtchn.h>
#include <xengnttab.h>
#include <xen/io/blkif.h>
#include <xen/io/xenbus.h>

#include "nodes.h"

#define PAGE 4096
#define SECTOR 512
#define SEGMENTS BLKIF_MAX_SEGMENTS_PER_REQUEST
#define MOST_KEPT 1056 /* persistent grants of a device */

struct device {
    char node[NODE_BYTES], front[NODE_BYTES]; /* empty: no device */
    int domid, state, storage;
    bool predecessor, writable, persistent, more;
    uint64_t sectors;
    blkif_back_ring_t ring; /* sring NULL: not connected */
    evtchn_port_t port;
    unsigned int kept;
    uint32_t kept_refs[MOST_KEPT];
    void *kept_pages[MOST_KEPT];
};

static xenevtchn_handle *xce;
static xengnttab_handle *xgt;
static long max_requests = -1, requests;
static bool copying;

static bool on_storage(const struct device *device, bool write, void *data, unsigned int length, uint64_t at)
{
    ssize_t done = write ? pwrite(device->storage, data, length, at) : pread(device->storage, data, length, at);

    return done == (ssize_t)length;
}

static bool move_mapped(struct device *device, const blkif_request_t *request, bool write)
{
    uint64_t at = request->sector_number * SECTOR;
    uint32_t refs[SEGMENTS];
    bool good = true;
    char *pages;

    for (unsigned int k = 0; k < request->nr_segments; k++)
        refs[k] = request->seg[k].gref;
    pages = xengnttab_map_domain_grant_refs(xgt, request->nr_segments, device->domid, refs,
                                            write ? PROT_READ : PROT_READ | PROT_WRITE);
    if (!pages)
        return false;
    for (unsigned int k = 0; k < request->nr_segments && good; k++) {
        const struct blkif_request_segment *segment = &request->seg[k];
        unsigned int length = (segment->last_sect - segment->first_sect + 1) * SECTOR;

        good = on_storage(device, write, pages + k * PAGE + segment->first_sect * SECTOR, length, at);
        at += length;
    }
    xengnttab_unmap(xgt, pages, request->nr_segments);
    return good;
}

/* A page that was mapped before, or is from now on, while there is room to keep it; NULL if it cannot be mapped. */
static char *kept_page(struct device *device, uint32_t ref, bool *kept)
{
    unsigned int i;
    void *page;

    for (i = 0; i < device->kept; i++)
        if (device->kept_refs[i] == ref)
            return device->kept_pages[i];
    page = xengnttab_map_grant_ref(xgt, device->domid, ref, PROT_READ | PROT_WRITE);
    *kept = page && i < MOST_KEPT;
    if (*kept) {
        device->kept_refs[i] = ref;
        device->kept_pages[device->kept++] = page;
    }
    return page;
}

static bool move_persistent(struct device *device, const blkif_request_t *request, bool write)
{
    uint64_t at = request->sector_number * SECTOR;
    bool good = true;

    for (unsigned int k = 0; k < request->nr_segments && good; k++) {
        const struct blkif_request_segment *segment = &request->seg[k];
        unsigned int length = (segment->last_sect - segment->first_sect + 1) * SECTOR;
        bool kept = true;
        char *page = kept_page(device, segment->gref, &kept);

        good = page && on_storage(device, write, page + segment->first_sect * SECTOR, length, at);
        if (page && !kept)
            xengnttab_unmap(xgt, page, 1);
        at += length;
    }
    return good;
}

static bool move_copied(struct device *device, const blkif_request_t *request, bool write, unsigned int total)
{
    static char buffer[SEGMENTS * PAGE];
    xengnttab_grant_copy_segment_t copies[SEGMENTS];
    unsigned int at = 0;

    if (!write && !on_storage(device, false, buffer, total, request->sector_number * SECTOR))
        return false;
    memset(copies, 0, sizeof(copies));
    for (unsigned int k = 0; k < request->nr_segments; k++) {
        const struct blkif_request_segment *segment = &request->seg[k];
        union xengnttab_copy_ptr *foreign = write ? &copies[k].source : &copies[k].dest;
        union xengnttab_copy_ptr *local = write ? &copies[k].dest : &copies[k].source;

        copies[k].flags = write ? GNTCOPY_source_gref : GNTCOPY_dest_gref;
        copies[k].len = (segment->last_sect - segment->first_sect + 1) * SECTOR;
        foreign->foreign.ref = segment->gref;
        foreign->foreign.offset = segment->first_sect * SECTOR;
        foreign->foreign.domid = device->domid;
        local->virt = buffer + at;
        at += copies[k].len;
    }
    if (xengnttab_grant_copy(xgt, request->nr_segments, copies))
        return false;
    for (unsigned int k = 0; k < request->nr_segments; k++)
        if (copies[k].status != GNTST_okay)
            return false;
    return !write || on_storage(device, true, buffer, total, request->sector_number * SECTOR);
}

static bool read_or_write(struct device *device, const blkif_request_t *request)
{
    bool write = request->operation == BLKIF_OP_WRITE;
    uint64_t total = 0;

    if (!request->nr_segments || request->nr_segments > SEGMENTS || (write && !device->writable))
        return false;
    for (unsigned int k = 0; k < request->nr_segments; k++) {
        if (request->seg[k].first_sect > request->seg[k].last_sect || request->seg[k].last_sect >= PAGE / SECTOR)
            return false;
        total += request->seg[k].last_sect - request->seg[k].first_sect + 1;
    }
    if (request->sector_number > device->sectors || total > device->sectors - request->sector_number)
        return false;
    if (copying)
        return move_copied(device, request, write, total * SECTOR);
    return device->persistent ? move_persistent(device, request, write) : move_mapped(device, request, write);
}

static int serve(struct device *device, const blkif_request_t *request)
{
    bool good;

    if (requests++ == max_requests)
        kill(getpid(), SIGKILL);
    if (request->operation == BLKIF_OP_READ || request->operation == BLKIF_OP_WRITE)
        good = read_or_write(device, request);
    else if (request->operation == BLKIF_OP_FLUSH_DISKCACHE)
        good = !fdatasync(device->storage);
    else
        return BLKIF_RSP_EOPNOTSUPP;
    return good ? BLKIF_RSP_OKAY : BLKIF_RSP_ERROR;
}

static void disconnect(struct device *device)
{
    if (!device->ring.sring)
        return;
    xenevtchn_unbind(xce, device->port);
    while (device->kept)
        xengnttab_unmap(xgt, device->kept_pages[--device->kept], 1);
    xengnttab_unmap(xgt, device->ring.sring, 1);
    device->ring.sring = NULL;
    device->more = false;
}

/* Take what is on the ring, at most what it holds, so that one device does not keep us from the others. False: the
 * frontend's index makes no sense. */
static bool run_ring(struct device *device)
{
    blkif_back_ring_t *ring = &device->ring;
    RING_IDX produced = ring->sring->req_prod;
    int notify;

    device->more = false;
    if (RING_REQUEST_PROD_OVERFLOW(ring, produced))
        return false;
    xen_rmb();
    while (ring->req_cons != produced) {
        blkif_request_t request;
        blkif_response_t *response;

        RING_COPY_REQUEST(ring, ring->req_cons, &request);
        ring->req_cons++;
        response = RING_GET_RESPONSE(ring, ring->rsp_prod_pvt++);
        response->status = serve(device, &request);
        response->id = request.id;
        response->operation = request.operation;
    }
    RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(ring, notify);
    if (notify)
        xenevtchn_notify(xce, device->port);
    RING_FINAL_CHECK_FOR_REQUESTS(ring, device->more);
    return true;
}

#endif
