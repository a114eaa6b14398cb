// A person's skin with lips, brows, beard, hair shadow and shirt. Output: square root of the colour, and gloss.
in vec3 place;
in vec4 masks;  // lips, eyelids, inside of the mouth, face
out vec4 painted;
uniform vec3 skin, lip, hair, shirt, shirt2;
uniform vec4 brow;    // height, thickness, arch, strength
uniform vec4 beard;   // strengths of beard and hair shadow
uniform vec4 collar;  // depth, width, pattern

vec3 complexion(vec2 mirrored) {
    vec3 colour = skin * (.92 + .16 * octaves(place * 9.));
    colour = mix(colour, colour * vec3(1.03, .96, .95), smoothstep(.45, .6, octaves(place * 3.)));
    float cheek = spot(mirrored, vec2(.47, 6.95), vec2(.26, .2)) * step(.5, place.z);
    colour = mix(colour, colour * vec3(1.07, .82, .80), .5 * cheek);
    float nose = spot(place.xy, vec2(0, 6.98), vec2(.16, .12)) * step(1., place.z);
    colour = mix(colour, colour * vec3(1.06, .87, .84), .35 * nose);
    float socket = spot(mirrored, vec2(.3, 7.28), vec2(.22, .12)) * step(.8, place.z);
    return mix(colour, colour * .62, .5 * socket);
}

float beard_here(vec2 mirrored) {
    float jaw = smoothstep(6.95, 6.75, place.y - .25 * smoothstep(.45, .75, mirrored.x))
        * smoothstep(5.95, 6.15, place.y + .25 * (place.z - 1.)) * smoothstep(.1, .45, place.z);
    float bare = .9 * spot(mirrored, vec2(.36, 6.84), vec2(.14, .17));
    float hairs = .75 + .5 * noise(place * vec3(70., 40., 60.));
    return clamp(jaw * (1. - bare) * beard.x * hairs, 0., .85);
}

float brow_here(float side) {
    float along = clamp((side - .12) / .46, 0., 1.);
    float middle = brow.x + brow.z * sin(clamp((side - .1) / .5, 0., 1.) * 2.6)
        - .10 * pow(clamp((side - .38) / .22, 0., 1.), 2.);
    float width = mix(brow.y, brow.y * .35, along);
    float inside = (1. - smoothstep(width * .4, width * 1.15, abs(place.y - middle)))
        * smoothstep(.07, .15, side) * (1. - smoothstep(.5, .6, side)) * step(.6, place.z);
    float hairs = .75 + .4 * noise(vec3(place.x * 70. + place.y * 60., place.y * 25., 3.));
    return clamp(inside * brow.w * hairs, 0., .9);
}

vec3 cloth(float edge) {
    float pattern = collar.z < .5 ? 0.
        : collar.z < 1.5 ? step(.5, fract(place.y * 5.))
        : collar.z < 2.5 ? step(.5, fract(place.x * 4. + .25))
        : step(.93, 1. - abs(place.x * 4.) * 2.);
    return mix(shirt, shirt2, pattern) * (.85 + .3 * octaves(place * 30.))
        * mix(.6, 1., smoothstep(0., .06, edge - place.y));
}

void main() {
    vec2 mirrored = vec2(abs(place.x), place.y);
    float gloss = mix(.35, .7, masks.x);
    vec3 colour = complexion(mirrored);
    colour = mix(colour, hair * .6, beard_here(mirrored));
    colour = mix(colour, lip * (.9 + .2 * noise(vec3(place.x * 50., place.y * 8., 1.))), masks.x * .92);
    colour = mix(colour, colour * vec3(.84, .72, .70), masks.y * .7);
    colour = mix(colour, mix(hair * .6, skin * .25, .25), brow_here(mirrored.x));
    float shadow = beard.y * smoothstep(-.02, .16, above_hairline(place)) * step(6.6, place.y);
    colour = mix(colour, hair * .75, shadow);
    colour = mix(colour, vec3(.16, .04, .04), masks.z);
    if (masks.z > .5) gloss = .1;
    float edge = 6.02 - collar.x * gauss(mirrored.x / collar.y) * smoothstep(-.4, .4, place.z)
        - .10 * gauss(mirrored.x / .9);
    if (place.y < edge) {
        colour = cloth(edge);
        gloss = 0.;
    }
    painted = vec4(sqrt(colour), gloss);
}
